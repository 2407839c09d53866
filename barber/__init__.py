"""LLM-Barber: prune large language models in one shot and rebuild their sparsity masks block by block.

What stands here is public: scripts import it, every `_target_` of a config names it. Where it lives may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barber.allocation import OWL, ErrorCurves, EvoPress
    from barber.api import BlockReport, Report, allocate, prune
    from barber.cache import Cache
    from barber.calibration import TokenSamples, hub_windows, offline_windows, text_windows
    from barber.comparison import Comparison, compare
    from barber.engine import Engine
    from barber.errors import BarberError, NumericsError, UserError
    from barber.evals import Agreement, Sample, ZeroShot
    from barber.evals.evaluation import evaluation
    from barber.export import HuggingFaceFolder, MaskFile
    from barber.metrics import Gradient, Weight, WeightGradient
    from barber.models import Packaged, Pretrained, RandomModel
    from barber.patterns import NM, Unstructured
    from barber.precision import Precision
    from barber.pruners import GBLM, RIA, Magnitude, Random, SparseGPT, Wanda, WandaPlus
    from barber.rebuild import Barber, DSnoT, Swaps
    from barber.texts import OfflineText, TextFiles, TokenFile, corpus
    from barber.tracking import Wandb
    from barber.updates import ADMM, ALPS, LeastSquares, Reconstruct, SparseGPTUpdate

__all__ = [
    "ADMM",
    "ALPS",
    "GBLM",
    "NM",
    "OWL",
    "RIA",
    "Agreement",
    "Barber",
    "BarberError",
    "BlockReport",
    "Cache",
    "Comparison",
    "DSnoT",
    "Engine",
    "ErrorCurves",
    "EvoPress",
    "Gradient",
    "HuggingFaceFolder",
    "LeastSquares",
    "Magnitude",
    "MaskFile",
    "NumericsError",
    "OfflineText",
    "Packaged",
    "Precision",
    "Pretrained",
    "Random",
    "RandomModel",
    "Reconstruct",
    "Report",
    "Sample",
    "SparseGPT",
    "SparseGPTUpdate",
    "Swaps",
    "TextFiles",
    "TokenFile",
    "TokenSamples",
    "Unstructured",
    "UserError",
    "Wanda",
    "WandaPlus",
    "Wandb",
    "Weight",
    "WeightGradient",
    "ZeroShot",
    "allocate",
    "compare",
    "corpus",
    "evaluation",
    "hub_windows",
    "offline_windows",
    "prune",
    "text_windows",
]

_ROOMS = {
    "allocation": ("OWL", "ErrorCurves", "EvoPress"),
    "api": ("BlockReport", "Report", "allocate", "prune"),
    "cache": ("Cache",),
    "calibration": ("TokenSamples", "hub_windows", "offline_windows", "text_windows"),
    "comparison": ("Comparison", "compare"),
    "engine": ("Engine",),
    "errors": ("BarberError", "NumericsError", "UserError"),
    "evals": ("Agreement", "Sample", "ZeroShot"),
    "evals.evaluation": ("evaluation",),
    "export": ("HuggingFaceFolder", "MaskFile"),
    "metrics": ("Gradient", "Weight", "WeightGradient"),
    "models": ("Packaged", "Pretrained", "RandomModel"),
    "patterns": ("NM", "Unstructured"),
    "precision": ("Precision",),
    "pruners": ("GBLM", "RIA", "Magnitude", "Random", "SparseGPT", "Wanda", "WandaPlus"),
    "rebuild": ("Barber", "DSnoT", "Swaps"),
    "texts": ("OfflineText", "TextFiles", "TokenFile", "corpus"),
    "tracking": ("Wandb",),
    "updates": ("ADMM", "ALPS", "LeastSquares", "Reconstruct", "SparseGPTUpdate"),
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for, so that `barber --help` does not wait for torch.
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"barber.{room}"), name)
    raise AttributeError(f"module 'barber' has no attribute {name!r}")
