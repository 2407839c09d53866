"""A walk with all that a run can give it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from barber import Report
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.runtime.activations import Place
from barber.runtime.precision import Precision
from barber.walk.checks import check_architecture, resolve_device
from barber.walk.pruning import Pruning
from barber.walk.walk import Schedule


def prune(
    model: PreTrainedModel,
    tokens_NL: torch.Tensor,
    *,
    pattern: Pattern | Mapping[str, Pattern],
    pruner: Pruner,
    rebuild: Rebuild | Sequence[Rebuild] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
    schedule: Schedule = "paper",
    activations: Place = "auto",
    scratch: Path | None = None,
    **given: Any,
) -> Report:
    """`barber.prune`; `given` are weights, checkpoint, initial masks and watchers of a run."""
    steps = rebuild if isinstance(rebuild, Sequence) else () if rebuild is None else (rebuild,)
    check_architecture(model, pattern)
    place = model.device if device is None else resolve_device(str(device))
    pruning = Pruning(
        pattern, pruner, steps, place, batch_size, precision or Precision(), schedule, activations, scratch
    )
    return pruning.carry_out(model, tokens_NL, **given)
