"""Results kept across runs: every run of a sweep starts from the same dense model, many from the same initial masks.

An entry is found by what its results depend on: the weights' content, the windows' token ids or the tasks' documents,
the protocol, versions, device and dtype. It holds `results.json` and, for the agreement, `reference.safetensors`.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from barber.evals.results import TextResults, ZeroShotResult
from barber.model.weights import InMemory, Weights
from barber.runtime.cache import Cache, Entry
from barber.runtime.files import written_whole
from barber.runtime.plain import plain, typed
from barber.runtime.tensors import Tensor

log = logging.getLogger("barber")

KIND = "results"
# One more whenever the same measurement gives other results: what was kept before is not found any more.
_FORMAT = 2

R = TypeVar("R", TextResults, ZeroShotResult)


def kept_results(entry: Entry, kind: type[R]) -> tuple[R, str] | None:
    """The results of an entry, and when they were measured; None where they cannot be read."""
    try:
        content = typed(dict[str, Any], json.loads((entry.folder / "results.json").read_text(encoding="utf-8")))
        return typed(kind, content.get("results")), typed(str, content.get("measured"))
    except (OSError, ValueError):  # a UserError is one
        return None


def kept_tensors(entry: Entry) -> dict[str, Tensor] | None:
    """The tensors beside the results, read from disk as they are used."""
    try:
        return load_file(entry.folder / "reference.safetensors")
    except (OSError, SafetensorError):
        return None


def keep(entry: Entry, results: TextResults | ZeroShotResult, tensors: dict[str, Tensor] | None = None) -> None:
    """Complete an entry; a full disk costs the entry and not the run."""
    try:
        kept = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "results": plain(results)}
        with written_whole(entry.folder / "results.json") as unfinished:
            unfinished.write_text(json.dumps(kept, indent=2), encoding="utf-8")
        if tensors is not None:
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            with written_whole(entry.folder / "reference.safetensors") as unfinished:
                save_file(whole, unfinished)
            size = sum(tensor.nbytes for tensor in whole.values()) / 2**20
            log.info("The dense model's outputs are kept for later runs, %.0f MiB in %s.", size, entry.folder)
        entry.complete()
    except (OSError, SafetensorError) as error:
        log.warning("The results are not kept for other runs: %s", error)


@dataclass(frozen=True)
class ResultCache:
    """The entries of the model as it is now on one machine setup."""

    cache: Cache
    model: PreTrainedModel
    device: torch.device
    weights: Weights | None = None

    def entry(self, **facts: Any) -> Entry:
        """The entry of a measurement, by what it depends on beside the model and the machine."""
        return self.cache.entry(KIND, self.facts | facts)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What every measurement depends on; reads all weights once."""
        return {
            "format": _FORMAT,
            "model": model_digest(self.model, self.weights or InMemory(self.model)),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        }


def model_digest(model: PreTrainedModel, weights: Weights) -> str:
    """SHA-256 of the config, and of the names, dtypes, shapes and bytes of all weights."""
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in weights.state():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
