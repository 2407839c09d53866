"""Initial masks: which weights go before anything is rebuilt. One file a method."""

from barber.pruners.base import GradientOf, Pruned, Pruner
from barber.pruners.gblm import GBLM
from barber.pruners.magnitude import Magnitude
from barber.pruners.random import Random
from barber.pruners.ria import RIA
from barber.pruners.sparsegpt import SparseGPT
from barber.pruners.wanda import Wanda
from barber.pruners.wanda_plus import WandaPlus

__all__ = ["GBLM", "RIA", "GradientOf", "Magnitude", "Pruned", "Pruner", "Random", "SparseGPT", "Wanda", "WandaPlus"]
