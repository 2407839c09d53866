"""LLM-Barber: prune large language models in one shot and rebuild their sparsity masks block by block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barber.api import BlockReport, Report, prune
    from barber.comparison import Comparison, compare
    from barber.errors import BarberError, NumericsError, UserError
    from barber.metrics import Gradient, Weight, WeightGradient
    from barber.patterns import NM, Unstructured
    from barber.pruners import RIA, Magnitude, SparseGPT, Wanda
    from barber.rebuild import Barber, Swaps

__all__ = [
    "NM",
    "RIA",
    "Barber",
    "BarberError",
    "BlockReport",
    "Comparison",
    "Gradient",
    "Magnitude",
    "NumericsError",
    "Report",
    "SparseGPT",
    "Swaps",
    "Unstructured",
    "UserError",
    "Wanda",
    "Weight",
    "WeightGradient",
    "compare",
    "prune",
]

_ROOMS = {
    "api": ("BlockReport", "Report", "prune"),
    "comparison": ("Comparison", "compare"),
    "errors": ("BarberError", "NumericsError", "UserError"),
    "metrics": ("Gradient", "Weight", "WeightGradient"),
    "patterns": ("NM", "Unstructured"),
    "pruners": ("RIA", "Magnitude", "SparseGPT", "Wanda"),
    "rebuild": ("Barber", "Swaps"),
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for, so that `barber --help` does not wait for torch.
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"barber.{room}"), name)
    raise AttributeError(f"module 'barber' has no attribute {name!r}")
