"""LLM-Barber: prune large language models in one shot and rebuild their sparsity masks block by block.

What stands here is public: scripts import it, every `_target_` of a config names it. Where it lives may change.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from barber.api import allocate, prune
    from barber.data.calibration import TokenSamples, hub_windows, offline_windows, text_windows
    from barber.data.texts import OfflineText, TextFiles, TokenFile, corpus
    from barber.errors import BarberError, NumericsError, UserError
    from barber.evals.agreement import Agreement
    from barber.evals.evaluation import evaluation
    from barber.evals.sample import Sample
    from barber.evals.zero_shot import ZeroShot
    from barber.methods.metrics import Gradient, Weight, WeightGradient
    from barber.methods.patterns import NM, Unstructured
    from barber.methods.pruners import GBLM, RIA, Magnitude, Random, SparseGPT, Wanda, WandaPlus
    from barber.methods.rebuild import Barber, DSnoT, Swaps
    from barber.methods.updates import ADMM, ALPS, LeastSquares, Reconstruct, SparseGPTUpdate
    from barber.model.engine import Engine
    from barber.model.gguf import Packaged
    from barber.model.sources import Pretrained, RandomModel
    from barber.notebook import calibrate, perplexity
    from barber.run.compare import Comparison, compare
    from barber.run.export import HuggingFaceFolder, MaskFile
    from barber.run.tracking import Wandb
    from barber.runtime.cache import Cache
    from barber.runtime.precision import Precision
    from barber.walk.allocation import OWL, ErrorCurves, EvoPress
    from barber.walk.report import BlockReport, Report

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
    "calibrate",
    "compare",
    "corpus",
    "evaluation",
    "hub_windows",
    "offline_windows",
    "perplexity",
    "prune",
    "text_windows",
]

_ROOMS = {
    "walk.allocation": ("OWL", "ErrorCurves", "EvoPress"),
    "api": ("allocate", "prune"),
    "notebook": ("calibrate", "perplexity"),
    "walk.report": ("BlockReport", "Report"),
    "runtime.cache": ("Cache",),
    "data.calibration": ("TokenSamples", "hub_windows", "offline_windows", "text_windows"),
    "run.compare": ("Comparison", "compare"),
    "model.engine": ("Engine",),
    "errors": ("BarberError", "NumericsError", "UserError"),
    "evals.agreement": ("Agreement",),
    "evals.evaluation": ("evaluation",),
    "evals.sample": ("Sample",),
    "evals.zero_shot": ("ZeroShot",),
    "run.export": ("HuggingFaceFolder", "MaskFile"),
    "methods.metrics": ("Gradient", "Weight", "WeightGradient"),
    "model.gguf": ("Packaged",),
    "model.sources": ("Pretrained", "RandomModel"),
    "methods.patterns": ("NM", "Unstructured"),
    "runtime.precision": ("Precision",),
    "methods.pruners": ("GBLM", "RIA", "Magnitude", "Random", "SparseGPT", "Wanda", "WandaPlus"),
    "methods.rebuild": ("Barber", "DSnoT", "Swaps"),
    "data.texts": ("OfflineText", "TextFiles", "TokenFile", "corpus"),
    "run.tracking": ("Wandb",),
    "methods.updates": ("ADMM", "ALPS", "LeastSquares", "Reconstruct", "SparseGPTUpdate"),
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for, so that `barber --help` does not wait for torch.
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"barber.{room}"), name)
    if name == "__version__":
        return version("llm-barber")
    raise AttributeError(f"module 'barber' has no attribute {name!r}")


def __dir__() -> list[str]:
    # What a notebook completes: not the rooms, which may move.
    return sorted([*__all__, "__version__"])
