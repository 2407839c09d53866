"""New values for the kept weights of a block, once the mask is there. One file a method."""

from barber.updates.admm import ADMM
from barber.updates.alps import ALPS
from barber.updates.least_squares import LeastSquares
from barber.updates.reconstruct import Reconstruct
from barber.updates.sparsegpt import SparseGPTUpdate

__all__ = ["ADMM", "ALPS", "LeastSquares", "Reconstruct", "SparseGPTUpdate"]
