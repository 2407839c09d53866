"""Initial masks: which weights go before anything is rebuilt. One file a method."""

from barber.pruners.base import Pruned, Pruner
from barber.pruners.magnitude import Magnitude
from barber.pruners.ria import RIA
from barber.pruners.sparsegpt import SparseGPT
from barber.pruners.wanda import Wanda

__all__ = ["RIA", "Magnitude", "Pruned", "Pruner", "SparseGPT", "Wanda"]
