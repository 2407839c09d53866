"""Where a run's model and its activations live: in memory, or on disk when they do not fit."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from barber.model.checkpoint import Checkpoint
from barber.model.sources import ModelSource
from barber.model.stream import Streamed, opened
from barber.model.weights import InMemory, Weights
from barber.runtime.activations import Place
from barber.runtime.memory import physical_memory

log = logging.getLogger("barber")

# of the machine's memory, for the weights of a model that is loaded as a whole
_SHARE_FOR_WEIGHTS = 0.7
# In the run folder, while the run goes on: weights that are made and not found (a random model's).
SOURCE = ".source"


@dataclass(frozen=True)
class Engine:
    """What is kept where.

    Args:
        streaming: read one decoder layer at a time from the model's files and write it to the run folder when it is
            finished, instead of loading the model; `auto`: where the model does not fit into memory.
        activations: where the samples wait between two layers: on the `device`, in `host` memory, on `disk`, or
            `auto`: the first of them that has room.
        disk_check: refuse a run for which the run folder's disk has too little room, before it begins.
    """

    streaming: bool | Literal["auto"] = "auto"
    activations: Place = "auto"
    disk_check: bool = True

    def streams(self, model: PreTrainedModel) -> bool:
        """Whether a model is streamed; it may be on the meta device."""
        if self.streaming != "auto":
            return self.streaming
        dtype: torch.dtype = model.config.dtype or torch.float32
        num_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        return bool(num_bytes > _SHARE_FOR_WEIGHTS * physical_memory(torch.device("cpu")))

    def open(
        self, source: ModelSource, streams: bool, checkpoint: Checkpoint | None, folder: Path
    ) -> tuple[PreTrainedModel, Weights]:
        """The model of a run and its weights; `folder` is that of the run."""
        if not streams:
            model = source.load()
            return model, InMemory(model, checkpoint)
        path, dtype = source.folder(folder / SOURCE)
        model, tensors = opened(source.config(), path, dtype)
        log.info("Streaming the decoder layers of %s from %s.", source, path)
        return model, Streamed(model, tensors, checkpoint)
