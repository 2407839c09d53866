"""Walks with all that a run can give them, and what they leave."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from barber import Barber, Report, Unstructured, Wanda
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.runtime.activations import Place
from barber.runtime.precision import Precision
from barber.walk.checks import check_architecture, resolve_device
from barber.walk.pruning import Pruning
from barber.walk.walk import BlockResult, LinearResult, Schedule, Walk
from tests import tiny

State = dict[str, torch.Tensor]


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


def walked(
    model: PreTrainedModel,
    pattern: Pattern | None = None,
    pruner: Pruner | None = None,
    rebuild: Rebuild | None = Barber(alpha=0.9),  # noqa: B008 (frozen)
    *,
    tokens_NL: torch.Tensor | None = None,
    batch_size: int = 4,
    **options: Any,
) -> tuple[list[BlockResult], State]:
    """What the walk itself gives, and a copy of the model that it leaves.

    Linears of 32 inputs need a large alpha: then something is exchanged in most rows.
    """
    tokens_NL = tiny.tokens(8) if tokens_NL is None else tokens_NL
    steps = [rebuild] if rebuild else []
    walk = Walk(
        model, tokens_NL, pattern or Unstructured(0.5), pruner or Wanda(), steps, tiny.CPU, batch_size, **options
    )
    return list(walk), state_of(model)


def state_of(model: PreTrainedModel) -> State:
    """A copy of a model's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def linears(results: Sequence[BlockResult]) -> dict[str, LinearResult]:
    """What has become of the linears, by their names."""
    return {linear.name: linear for block in results for linear in block.linears}


def assert_the_same(one: tuple[list[BlockResult], State], other: tuple[list[BlockResult], State]) -> None:
    """The same bits: masks, initially pruned weights, losses, and the model."""
    (results, model), (results_too, model_too) = one, other
    losses = [[(block.loss_before, block.loss_after) for block in blocks] for blocks in (results, results_too)]
    assert losses[0] == losses[1]
    for name, linear in linears(results).items():
        too = linears(results_too)[name]
        assert torch.equal(linear.initial.mask_OI, too.initial.mask_OI), name
        assert torch.equal(linear.initial.weight_OI, too.initial.weight_OI), name
        assert torch.equal(linear.final.mask_OI, too.final.mask_OI), name
    for name, tensor in model.items():
        assert torch.equal(tensor, model_too[name]) and tensor.dtype == model_too[name].dtype, name
