"""LLM-Barber: prune large language models in one shot and rebuild their sparsity masks block by block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barber.allocation import OWL, Error, EvoPress
    from barber.api import BlockReport, Report, allocate, prune
    from barber.comparison import Comparison, compare
    from barber.errors import BarberError, NumericsError, UserError
    from barber.metrics import Gradient, Weight, WeightGradient
    from barber.patterns import NM, Unstructured
    from barber.pruners import GBLM, RIA, Magnitude, Random, SparseGPT, Wanda, WandaPlus
    from barber.rebuild import Barber, DSnoT, Swaps
    from barber.updates import ADMM, ALPS, LeastSquares, Reconstruct, SparseGPTUpdate

__all__ = [
    "ADMM",
    "ALPS",
    "GBLM",
    "NM",
    "OWL",
    "RIA",
    "Barber",
    "BarberError",
    "BlockReport",
    "Comparison",
    "DSnoT",
    "Error",
    "EvoPress",
    "Gradient",
    "LeastSquares",
    "Magnitude",
    "NumericsError",
    "Random",
    "Reconstruct",
    "Report",
    "SparseGPT",
    "SparseGPTUpdate",
    "Swaps",
    "Unstructured",
    "UserError",
    "Wanda",
    "WandaPlus",
    "Weight",
    "WeightGradient",
    "allocate",
    "compare",
    "prune",
]

_ROOMS = {
    "allocation": ("OWL", "Error", "EvoPress"),
    "api": ("BlockReport", "Report", "allocate", "prune"),
    "comparison": ("Comparison", "compare"),
    "errors": ("BarberError", "NumericsError", "UserError"),
    "metrics": ("Gradient", "Weight", "WeightGradient"),
    "patterns": ("NM", "Unstructured"),
    "pruners": ("GBLM", "RIA", "Magnitude", "Random", "SparseGPT", "Wanda", "WandaPlus"),
    "rebuild": ("Barber", "DSnoT", "Swaps"),
    "updates": ("ADMM", "ALPS", "LeastSquares", "Reconstruct", "SparseGPTUpdate"),
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for, so that `barber --help` does not wait for torch.
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"barber.{room}"), name)
    raise AttributeError(f"module 'barber' has no attribute {name!r}")
