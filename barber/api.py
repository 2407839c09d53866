"""Pruning as a function call, for notebooks and scripts."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.errors import UserError, within
from barber.methods.patterns import Exactly, Pattern, Unstructured
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.model.decoder import Decoder
from barber.runtime.bars import following
from barber.runtime.distributed import Ranks
from barber.runtime.precision import Precision
from barber.runtime.tensors import Tensor
from barber.walk.allocation import Allocating, Allocation
from barber.walk.arguments import (
    allocation_from,
    described,
    pattern_from,
    patterns_from,
    pruner_from,
    require_count,
    require_flag,
    require_model,
    require_one_of,
    steps_from,
    tokens_from,
)
from barber.walk.checks import check_architecture, check_methods, check_tokens, check_weights, resolve_device
from barber.walk.pruning import Pruning
from barber.walk.report import Report
from barber.walk.skipping import of_the_rest, skipped
from barber.walk.walk import Schedule

# A pattern, or its short form: 0.5 or "2:4".
PatternLike = Pattern | float | str


def prune(
    model: PreTrainedModel,
    tokens_NL: Tensor | Sequence[str],
    *,
    pattern: PatternLike | Mapping[str, PatternLike],
    pruner: Pruner | str,
    rebuild: Rebuild | str | Sequence[Rebuild | str] | None = None,
    skip: Sequence[int | str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
    schedule: Schedule = "paper",
    progress: bool = False,
) -> Report:
    """Prune a model in place and, if asked, rebuild its masks block by block.

    Under torchrun, with a process group, every process takes its share of the samples; all end with the same masks.

    Args:
        model: a causal language model of a supported family, in memory, its weights plain parameters.
        tokens_NL: calibration samples, integer token ids; or texts, with a `tokenizer`: joined, and cut into at most
            128 samples of 2048 tokens, shorter ones where model or texts have fewer.
        pattern: what the masks look like, `Unstructured(0.5)` or `NM(2, 4)`, for short 0.5 or "2:4"; or that of every
            linear, by name, as `allocate` gives them.
        pruner: the method of the initial masks, `Magnitude()`, `SparseGPT()`, or a name as "wanda", with its defaults.
        rebuild: `Barber(...)`, "swaps", a list of steps, which may end with an update of the kept weights such as
            `LeastSquares()`, or None to leave the initial masks.
        skip: what stays dense: layers, 0 or "0-3", names of linears, "*.down_proj", or "re:" and a regular expression.
        device: where to compute; one layer at a time is taken there. None: where the model is.
        batch_size: samples that go through a layer together; None: as many as fit comfortably.
        precision: of the matrix products; None: float32 on a CPU, bfloat16 on a GPU.
        schedule: `paper`, or `interleaved`: the initial mask of a block is computed on the inputs that its rebuilding
            has, which saves a third of the work and gives other masks.
        progress: show a bar, which takes the package rich.

    Raises:
        UserError: an argument is wrong or they do not fit together; nothing has been changed then.
        NumericsError: NaN or infinite values; layers before the one it names are pruned.
    """
    chosen, chooses, steps = patterns_from(pattern), pruner_from(pruner), steps_from(rebuild)
    require_one_of(get_args(Schedule), schedule, "schedule")
    check_methods(chosen, chooses, steps, schedule)
    samples_NL, left_out = _checked(model, tokens_NL, tokenizer, chosen, skip)
    how = _how(model, device, batch_size, precision)
    pruning = Pruning(of_the_rest(chosen, model, left_out), chooses, list(steps.values()), *how, schedule)
    done, total = count(1), sum(len(layer.blocks) for layer in Decoder(model).layers)
    with following("Pruning, block by block", _is_shown(progress)) as advance:
        return pruning.carry_out(model, samples_NL, on_block=lambda *_: advance(next(done), total))


def allocate(
    model: PreTrainedModel,
    tokens_NL: Tensor | Sequence[str],
    *,
    allocation: Allocation | str,
    pattern: Unstructured | float,
    skip: Sequence[int | str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
    progress: bool = False,
) -> dict[str, Exactly]:
    """How many weights every linear of a dense model shall lose, for `prune(pattern=...)`.

    Args:
        allocation: `OWL()`, `ErrorCurves()`, `EvoPress()`, for short "owl", "error", "evopress".
        pattern: the sparsity of all of them together, which is exact to one weight.

    The others are those of `prune`.

    Raises:
        UserError: N:M, which stays uniform, or another argument that is wrong.
        NumericsError: NaN or infinite activations.
    """
    method, overall = allocation_from(allocation), pattern_from(pattern)
    method.check(overall)
    if not isinstance(overall, Unstructured):
        raise UserError(f"must be the sparsity of all linears together, Unstructured(0.5), not {overall}", "pattern")
    samples_NL, left_out = _checked(model, tokens_NL, tokenizer, overall, skip)
    allocating = Allocating(method, overall, *_how(model, device, batch_size, precision), left_out=left_out)
    with following("Allocating sparsity", _is_shown(progress)) as advance:
        return allocating.carry_out(model, samples_NL, watch=advance)


def _checked(
    model: PreTrainedModel,
    given: Tensor | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    pattern: Pattern | Mapping[str, Pattern],
    skip: Sequence[int | str],
) -> tuple[Tensor, frozenset[str]]:
    """The calibration samples, [samples, tokens], and the linears that are left out, of a model that can be pruned."""
    require_model(model)
    check_weights(model)
    left_out = skipped(skip, model)
    check_architecture(model, pattern, left_out)
    tokens_NL = tokens_from(given, tokenizer, model)
    check_tokens(tokens_NL, model.config, "tokens_NL")
    Ranks.present().require_samples(len(tokens_NL))
    return tokens_NL, left_out


def _how(
    model: PreTrainedModel, device: str | torch.device | None, batch_size: int | None, precision: Precision | None
) -> tuple[torch.device, int | None, Precision]:
    """Where to compute, how much of it together, and in which precision."""
    if batch_size is not None:
        require_count(batch_size, "batch_size")
    if precision is not None and not isinstance(precision, Precision):
        raise UserError(f"must be a Precision(forward='bfloat16'), not {described(precision)}", field="precision")
    place = model.device if device is None else resolve_device(str(device))
    kinds = precision or Precision()
    with within("precision"):
        kinds.check(place)
    return place, batch_size, kinds


def _is_shown(progress: bool) -> bool:
    """Whether this is the process to show a bar."""
    require_flag(progress, "progress")
    return progress and Ranks.present().leads
