"""New values for the kept weights of a block, once the mask is there. One file a method."""

from barber.methods.updates.admm import ADMM
from barber.methods.updates.alps import ALPS
from barber.methods.updates.least_squares import LeastSquares
from barber.methods.updates.reconstruct import Reconstruct
from barber.methods.updates.sparsegpt import SparseGPTUpdate

__all__ = ["ADMM", "ALPS", "LeastSquares", "Reconstruct", "SparseGPTUpdate"]
