"""Initial masks: which weights go before anything is rebuilt. One file a method."""

from barber.methods.pruners.base import GradientOf, Pruner
from barber.methods.pruners.gblm import GBLM
from barber.methods.pruners.magnitude import Magnitude
from barber.methods.pruners.random import Random
from barber.methods.pruners.ria import RIA
from barber.methods.pruners.sparsegpt import SparseGPT
from barber.methods.pruners.wanda import Wanda
from barber.methods.pruners.wanda_plus import WandaPlus

__all__ = ["GBLM", "RIA", "GradientOf", "Magnitude", "Pruner", "Random", "SparseGPT", "Wanda", "WandaPlus"]
