"""Pruning as a function call, for notebooks and scripts."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from barber.errors import UserError
from barber.methods.patterns import Exactly, Pattern, Unstructured
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.runtime.distributed import Ranks
from barber.runtime.precision import Precision
from barber.runtime.tensors import Tensor
from barber.walk.allocation import Allocating, Allocation
from barber.walk.checks import check_architecture, check_methods, check_tokens, check_weights, resolve_device
from barber.walk.pruning import Pruning
from barber.walk.report import Report
from barber.walk.walk import Schedule


def prune(
    model: PreTrainedModel,
    tokens_NL: Tensor,
    *,
    pattern: Pattern | Mapping[str, Pattern],
    pruner: Pruner,
    rebuild: Rebuild | Sequence[Rebuild] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
    schedule: Schedule = "paper",
) -> Report:
    """Prune a model in place and, if asked, rebuild its masks block by block.

    Under torchrun, with a process group, every process takes its share of the samples; all end with the same masks.

    Args:
        model: a causal language model of a supported family, in memory, its weights plain parameters.
        tokens_NL: calibration samples, integer token ids.
        pattern: what the masks look like, `Unstructured(0.5)` or `NM(2, 4)`; or that of every linear, by name, as
            `allocate` gives them.
        pruner: the method of the initial masks, `Magnitude()`, `Wanda()`, `SparseGPT()`.
        rebuild: `Barber(...)`, `Swaps()`, a list of steps, which may end with an update of the kept weights such as
            `LeastSquares()`, or None to leave the initial masks.
        device: where to compute; one layer at a time is taken there. None: where the model is.
        batch_size: samples that go through a layer together; None: as many as fit comfortably.
        precision: of the matrix products; None: float32 on a CPU, bfloat16 on a GPU.
        schedule: `paper`, or `interleaved`: the initial mask of a block is computed on the inputs that its rebuilding
            has, which saves a third of the work and gives other masks.

    Raises:
        UserError: the arguments do not fit together; nothing has been changed then.
        NumericsError: NaN or infinite values; layers before the one it names are pruned.

    Examples:
        >>> report = prune(model, tokens, pattern=NM(2, 4), pruner=Wanda(), rebuild=Barber(alpha=0.1))
        >>> report.sparsity
        0.5
    """
    _check_batch_size(batch_size)
    steps = rebuild if isinstance(rebuild, Sequence) else () if rebuild is None else (rebuild,)
    keys = ["rebuild"] if len(steps) == 1 else [f"rebuild[{i}]" for i in range(len(steps))]
    check_methods(pattern, pruner, dict(zip(keys, steps, strict=True)), schedule)
    _check_inputs(model, tokens_NL, pattern)
    place = model.device if device is None else resolve_device(str(device))
    pruning = Pruning(pattern, pruner, steps, place, batch_size, precision or Precision(), schedule)
    return pruning.carry_out(model, tokens_NL)


def allocate(
    model: PreTrainedModel,
    tokens_NL: Tensor,
    *,
    allocation: Allocation,
    pattern: Unstructured,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
) -> dict[str, Exactly]:
    """How many weights every linear of a dense model shall lose, for `prune(pattern=...)`.

    Args:
        allocation: `OWL()`, `ErrorCurves()`, `EvoPress()`.
        pattern: the sparsity of all of them together, which is exact to one weight.

    The others are those of `prune`.

    Raises:
        UserError: N:M, which stays uniform.
        NumericsError: NaN or infinite activations.
    """
    _check_batch_size(batch_size)
    allocation.check(pattern)
    _check_inputs(model, tokens_NL, pattern)
    place = model.device if device is None else resolve_device(str(device))
    allocating = Allocating(allocation, pattern, place, batch_size, precision or Precision())
    return allocating.carry_out(model, tokens_NL)


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise UserError(f"must be at least 1, not {batch_size}", field="batch_size")


def _check_inputs(model: PreTrainedModel, tokens_NL: Tensor, pattern: Pattern | Mapping[str, Pattern]) -> None:
    check_weights(model)
    check_architecture(model, pattern)
    check_tokens(tokens_NL, model.config, "tokens_NL")
    Ranks.present().require_samples(len(tokens_NL))
