"""Results of dense models, kept across runs: every run of a sweep starts from the same one.

An entry is found by what its results depend on: the weights' content, the windows' token ids or the tasks' documents,
the protocol, versions, device and dtype. It holds `results.json` and, for the agreement, `reference.safetensors`.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from barber.models import cache_folder
from barber.tensors import Tensor
from barber.weights import InMemory, Weights

log = logging.getLogger("barber")

FOLDER = "dense"
# One more whenever the same measurement gives other results: what was kept before is not found any more.
_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """What the cache holds, or is to hold, about one measurement."""

    folder: Path
    facts: dict[str, Any]

    def results(self) -> dict[str, Any] | None:
        """The `results`, and when they were `measured`; None where there are none."""
        try:
            kept = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return kept if isinstance(kept, dict) and {"results", "measured"} <= kept.keys() else None

    def tensors(self) -> dict[str, Tensor] | None:
        """The tensors beside the results, read from disk as they are used."""
        try:
            return load_file(self.folder / "reference.safetensors")
        except (OSError, SafetensorError):
            return None

    def save(self, results: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Keep an entry, whole or not at all; a full disk costs the entry and not the run."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=".unfinished-"))
        except OSError as error:
            log.warning("The dense model's results are not kept: %s", error)
            return
        try:
            kept = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "facts": self.facts}
            text = json.dumps(kept | {"results": results}, indent=2)
            (unfinished / "results.json").write_text(text, encoding="utf-8")
            if tensors is not None:
                whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(whole, unfinished / "reference.safetensors")
                size = sum(tensor.nbytes for tensor in whole.values()) / 2**20
                log.info("The dense model's outputs are kept for later runs, %.0f MiB in %s.", size, self.folder)
            if self.results() is None or (tensors is not None and self.tensors() is None):
                shutil.rmtree(self.folder, ignore_errors=True)  # a broken one would be in the way for good
            with suppress(OSError):  # another process was faster
                unfinished.rename(self.folder)
        except (OSError, SafetensorError) as error:
            log.warning("The dense model's results are not kept: %s", error)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@dataclass(frozen=True)
class DenseCache:
    """The entries of one dense model on one machine setup."""

    facts: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device, weights: Weights | None = None) -> "DenseCache":
        """The cache for a model that is dense now; reads all its weights once."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return cls(
            {
                "format": _FORMAT,
                "model": _digest(model, weights or InMemory(model)),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "device": name,
                "threads": torch.get_num_threads(),
            }
        )

    def entry(self, **facts: Any) -> Entry:
        """The entry of a measurement, by what it depends on beside the model and the machine."""
        facts = self.facts | facts
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return Entry(cache_folder() / FOLDER / key[:32], facts)


def _digest(model: PreTrainedModel, weights: Weights) -> str:
    """SHA-256 of the config, and of the names, dtypes, shapes and bytes of all weights."""
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in weights.state():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
