"""Slow oracles: the method's rules written out as plain loops, to hold the fast code against.

They share nothing with the package. Scores and masks are lists or arrays on which Python counts, sorts and compares;
a mask is True where a weight is pruned. Ties go to the lower index throughout.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def lowest(scores: Sequence[float], count: int) -> list[bool]:
    """Prune the `count` lowest scores of one group."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i in order[:count] for i in range(len(scores))]


def lowest_of_cells(row: Sequence[float], n: int, m: int) -> list[bool]:
    """Prune all but the `n` highest scores of every `m` consecutive ones of a row."""
    return [gone for start in range(0, len(row), m) for gone in lowest(row[start : start + m], m - n)]


def lowest_with_the_next(scores: Sequence[float], sparsity: float) -> list[bool]:
    """Prune all up to index int(number * sparsity) of the ascending sort: one more than the share."""
    return lowest(scores, int(len(scores) * sparsity) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Exchanging


def exchange(scores: Sequence[float], pruned: Sequence[bool], alpha: float) -> tuple[list[bool], int]:
    """Exchange inside one group; the new mask and the number of exchanges."""
    growth = _order(scores, [i for i in range(len(scores)) if pruned[i]], highest_first=True)
    loss = _order(scores, [i for i in range(len(scores)) if not pruned[i]])
    exchanged = int(_pairs_worth_it(scores, growth, loss) * alpha)
    return _swapped(pruned, growth[:exchanged], loss[:exchanged]), exchanged


def exchange_nm_by_row(scores: Sequence[float], pruned: Sequence[bool], alpha: float, m: int) -> tuple[list[bool], int]:
    """The paper's N:M exchange of one output row: growth is decided over the row, loss inside each cell of `m`."""
    growth: list[int] = []
    for cell in _cells(len(scores), m):
        # A cell that keeps fewer than it prunes can't take back more than it has to give.
        kept = sum(not pruned[i] for i in cell)
        growth += _order(scores, [i for i in cell if pruned[i]], highest_first=True)[:kept]
    growth = _order(scores, growth, highest_first=True)
    loss = _order(scores, [i for i in range(len(scores)) if not pruned[i]])
    exchanged = int(_pairs_worth_it(scores, growth, loss) * alpha)
    grown = growth[:exchanged]
    dropped: list[int] = []
    for cell in _cells(len(scores), m):
        dropped += _order(scores, [i for i in cell if not pruned[i]])[: sum(i in grown for i in cell)]
    return _swapped(pruned, grown, dropped), exchanged


def exchange_nm_in_cells(
    scores: Sequence[float], pruned: Sequence[bool], alpha: float, m: int
) -> tuple[list[bool], int]:
    """The N:M exchange of one output row that pairs inside the cells of `m` and never loses."""
    pairs: list[tuple[float, int, int]] = []
    for cell in _cells(len(scores), m):
        growth = _order(scores, [i for i in cell if pruned[i]], highest_first=True)
        loss = _order(scores, [i for i in cell if not pruned[i]])
        for grown, dropped in zip(growth, loss, strict=False):
            gain = scores[grown] - scores[dropped]
            if gain > 0:
                pairs.append((gain, grown, dropped))
    exchanged = int(len(pairs) * alpha)
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:exchanged]  # stable: of equal gains the earlier cell's first
    return _swapped(pruned, [grown for _, grown, _ in pairs], [dropped for _, _, dropped in pairs]), exchanged


def _cells(length: int, m: int) -> list[range]:
    return [range(start, start + m) for start in range(0, length, m)]


def _order(scores: Sequence[float], candidates: Iterable[int], highest_first: bool = False) -> list[int]:
    return sorted(candidates, key=lambda i: (-scores[i] if highest_first else scores[i], i))


def _pairs_worth_it(scores: Sequence[float], growth: Sequence[int], loss: Sequence[int]) -> int:
    return sum(scores[grown] > scores[dropped] for grown, dropped in zip(growth, loss, strict=False))


def _swapped(pruned: Sequence[bool], grown: Sequence[int], dropped: Sequence[int]) -> list[bool]:
    return [(gone and i not in grown) or i in dropped for i, gone in enumerate(pruned)]


Place = tuple[str, int, int]


def exchange_block(
    score_OI: dict[str, torch.Tensor], pruned_OI: dict[str, torch.Tensor], granularity: str, alpha: float
) -> tuple[dict[str, torch.Tensor], int]:
    """Exchange among the linears of a block: gather the weights that compete, exchange, put the masks back.

    Returns the new masks and the number of exchanges of the whole block.
    """
    groups: dict[Any, list[Place]] = {}
    for name, mask_OI in pruned_OI.items():
        for o in range(mask_OI.shape[0]):
            for i in range(mask_OI.shape[1]):
                group = {"output": (name, o), "input": (name, i), "layer": name, "block": None}[granularity]
                groups.setdefault(group, []).append((name, o, i))
    scores = {name: score.tolist() for name, score in score_OI.items()}
    masks = {name: mask.tolist() for name, mask in pruned_OI.items()}
    total = 0
    for places in groups.values():
        before = [masks[name][o][i] for name, o, i in places]
        after, count = exchange([scores[name][o][i] for name, o, i in places], before, alpha)
        for (name, o, i), gone in zip(places, after, strict=True):
            masks[name][o][i] = gone
        total += count
    return {name: torch.tensor(mask) for name, mask in masks.items()}, total


# ---------------------------------------------------------------------------------------------------------------------
# Initial masks. `inputs` are the (L, I) inputs of a linear, one matrix a sample.


@dataclass(frozen=True)
class Sparsity:
    """Which share of the weights goes (`ratio`), or how many of how many consecutive ones stay (`n`, `m`)."""

    ratio: float = 0.5
    n: int | None = None
    m: int | None = None


def magnitude(weight_OI: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """The mask of magnitude pruning."""
    return lowest_of_all(np.abs(weight_OI), sparsity)


def wanda(weight_OI: np.ndarray, inputs: Sequence[np.ndarray], sparsity: Sparsity) -> np.ndarray:
    """The mask of Wanda."""
    second_moment = np.mean([[sum(x_L**2) for x_L in x_LI.astype(np.float64).T] for x_LI in inputs], axis=0)
    return lowest_of_rows(np.abs(weight_OI) * np.sqrt(second_moment), sparsity)


def ria(weight_OI: np.ndarray, inputs: Sequence[np.ndarray], sparsity: Sparsity, whole: bool) -> np.ndarray:
    """The mask of RIA with exponent 0.5, weights compared in every row or over the whole matrix."""
    second_moment = np.mean([[sum(x_L**2) for x_L in x_LI.astype(np.float64).T] for x_LI in inputs], axis=0)
    size, score = np.abs(weight_OI.astype(np.float64)), np.empty(weight_OI.shape)
    for o, i in np.ndindex(*size.shape):
        relative = size[o, i] / sum(size[:, i]) + size[o, i] / sum(size[o])
        score[o, i] = relative * second_moment[i] ** 0.25
    return lowest_of_all(score, sparsity) if whole else lowest_of_rows(score, sparsity)


def lowest_of_rows(score_OI: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Prune the lowest scores of every row, or of every cell."""
    if sparsity.m is not None:
        return _prune_cells(score_OI, sparsity)
    return np.array([lowest(row.tolist(), int(len(row) * sparsity.ratio)) for row in score_OI])


def lowest_of_all(score_OI: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Prune the lowest scores of the whole matrix and one more, or the lowest of every cell."""
    if sparsity.m is not None:
        return _prune_cells(score_OI, sparsity)
    return np.array(lowest_with_the_next(score_OI.flatten().tolist(), sparsity.ratio)).reshape(score_OI.shape)


def _prune_cells(score: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    assert sparsity.n is not None and sparsity.m is not None
    return np.array([lowest_of_cells(row.tolist(), sparsity.n, sparsity.m) for row in score])


def sparsegpt(
    weight_OI: np.ndarray,
    inputs: Sequence[np.ndarray],
    sparsity: Sparsity,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the weight that SparseGPT leaves: column after column, every error spread at once, in float64."""
    hessian = sum(2 * x_LI.astype(np.float64).T @ x_LI.astype(np.float64) for x_LI in inputs) / len(inputs)
    weight = weight_OI.astype(np.float64).copy()
    width = weight.shape[1]
    for i in range(width):
        if hessian[i, i] == 0:
            hessian[i, i] = 1
            weight[:, i] = 0
    hessian = hessian + damping * np.mean(np.diag(hessian)) * np.eye(width)
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T  # upper factor
    mask = np.zeros(weight.shape, dtype=bool)
    for j in range(width):
        # Columns are chosen block by block, or cell by cell, from the weights as updated by all columns before.
        ahead = np.arange(j, min(j + block_size, width) if sparsity.m is None else j + sparsity.m)
        if sparsity.m is None and j % block_size == 0:
            score = weight[:, ahead] ** 2 / np.diag(inverse)[ahead] ** 2
            chosen = lowest_with_the_next(score.flatten().tolist(), sparsity.ratio)
            mask[:, ahead] = np.array(chosen).reshape(score.shape)
        if sparsity.m is not None and j % sparsity.m == 0:
            mask[:, ahead] = _prune_cells(weight[:, ahead] ** 2 / np.diag(inverse)[ahead] ** 2, sparsity)
        for o in range(weight.shape[0]):
            if mask[o, j]:
                error = weight[o, j] / inverse[j, j]
                weight[o, j + 1 :] -= error * inverse[j, j + 1 :]
                weight[o, j] = 0
    return mask, weight


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def mean_squared_gradient(
    loss: Callable[[torch.Tensor], torch.Tensor], weights: dict[str, torch.Tensor], samples: Iterable[torch.Tensor]
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Mean over samples of the squared gradient of loss(sample) by every weight: autograd, one sample at a time.

    Returns it in float64 together with the samples' losses.
    """
    total = {name: np.zeros(tuple(weight.shape)) for name, weight in weights.items()}
    losses = []
    for sample in samples:
        value = loss(sample)
        gradients = torch.autograd.grad(value, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient.double().numpy() ** 2
        losses.append(value.item())
    return {name: squared / len(losses) for name, squared in total.items()}, losses


# ---------------------------------------------------------------------------------------------------------------------
# The whole walk of a llama


@dataclass
class Walked:
    """What a walk leaves behind.

    Args:
        initial: the mask of every linear that the pruner gave it.
        final: its mask after the rebuilding.
        weight: its weight after the rebuilding.
        loss_before: of every block in the order of the walk, the mean loss of the initial masks.
        loss_after: the same of the rebuilt masks.
    """

    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    final: dict[str, torch.Tensor] = field(default_factory=dict)
    weight: dict[str, torch.Tensor] = field(default_factory=dict)
    loss_before: list[float] = field(default_factory=list)
    loss_after: list[float] = field(default_factory=list)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def walk(
    model: PreTrainedModel,
    tokens_NL: torch.Tensor,
    method: str,
    sparsity: Sparsity,
    schedule: str = "paper",
    *,
    alpha: float,
    granularity: str = "output",
    retain: bool = False,
) -> Walked:
    """A llama pruned and rebuilt one sample at a time, with a dense copy beside the sparse one.

    The paper's procedure prunes the whole model first, layer after layer, and then rebuilds the whole model, block
    after block. Interleaved, a block gets its initial mask right before it is rebuilt, on the inputs that come through
    everything before it, rebuilt.
    """
    dense, sparse = copy.deepcopy(model), copy.deepcopy(model)
    result = Walked()
    first = [
        _call_of(dense.model.layers[0], dense, ((tokens_L[None],), {"use_cache": False})) for tokens_L in tokens_NL
    ]
    calls = first
    if schedule == "paper":
        for index, layer in enumerate(sparse.model.layers):
            _prune(layer, f"model.layers.{index}.", _fed(layer, calls), method, sparsity, result)
            calls = _next_layers(layer, calls)
    calls = first
    for index, layer in enumerate(sparse.model.layers):
        for part in ("self_attn", "mlp"):
            block, dense_block = getattr(layer, part), getattr(dense.model.layers[index], part)
            prefix = f"model.layers.{index}.{part}."
            inside = [_call_of(block, layer, call) for call in calls]
            if schedule == "interleaved":
                _prune(block, prefix, _fed(dense_block, inside), method, sparsity, result)
            _rebuild(block, dense_block, prefix, inside, sparsity, alpha, granularity, retain, result)
        calls = _next_layers(layer, calls)
    return result


def _prune(
    module: nn.Module,
    prefix: str,
    inputs: dict[str, list[np.ndarray]],
    method: str,
    sparsity: Sparsity,
    result: Walked,
) -> None:
    for name, linear in _linears(module).items():
        weight = linear.weight.detach().numpy()
        if method == "sparsegpt":
            mask, weight = sparsegpt(weight, inputs[name], sparsity)
        else:
            mask = magnitude(weight, sparsity) if method == "magnitude" else wanda(weight, inputs[name], sparsity)
        result.initial[prefix + name] = torch.from_numpy(mask)
        linear.weight.data = torch.from_numpy(np.where(mask, 0, weight)).float()


def _rebuild(
    block: nn.Module,
    dense_block: nn.Module,
    prefix: str,
    calls: list[Call],
    sparsity: Sparsity,
    alpha: float,
    granularity: str,
    retain: bool,
    result: Walked,
) -> None:
    def loss(call: Call) -> torch.Tensor:
        with torch.no_grad():
            y_sparse = _output(block, call)
        return (_output(dense_block, call) - y_sparse).square().mean()

    pruned = {name: result.initial[prefix + name] for name in _linears(block)}
    weights = {name: linear.weight for name, linear in _linears(dense_block).items()}
    squared, losses = mean_squared_gradient(loss, weights, calls)
    kept = {name: weight.detach() for name, weight in weights.items()}
    if retain:
        updated = {name: linear.weight.detach() for name, linear in _linears(block).items()}
        kept = {name: torch.where(pruned[name], kept[name], updated[name]) for name in kept}
    score = {name: kept[name].abs().double() * torch.from_numpy(squared[name]).sqrt() for name in kept}
    if sparsity.m is None:
        final, _ = exchange_block(score, pruned, granularity, alpha)
    else:
        final = {
            name: torch.tensor([exchange_nm_by_row(row, gone, alpha, sparsity.m)[0] for row, gone in rows])
            for name, rows in ((name, zip(score[name].tolist(), pruned[name].tolist(), strict=True)) for name in score)
        }
    for name, linear in _linears(block).items():
        linear.weight.data = kept[name].masked_fill(final[name], 0)
        result.final[prefix + name] = final[name]
        result.weight[prefix + name] = linear.weight.data
    result.loss_before.append(math.fsum(losses) / len(losses))
    result.loss_after.append(math.fsum(loss(call).item() for call in calls) / len(calls))


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _output(module: nn.Module, call: Call) -> torch.Tensor:
    args, kwargs = call
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def _call_of(inner: nn.Module, outer: nn.Module, call: Call) -> Call:
    """What `inner` is called with while `outer` runs."""
    seen: list[Call] = []
    hook = inner.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    outer(*call[0], **call[1])
    hook.remove()
    return seen[0]


@torch.no_grad()
def _fed(module: nn.Module, calls: list[Call]) -> dict[str, list[np.ndarray]]:
    """What the linears of a module are fed, sample by sample."""
    linears = _linears(module)
    inputs: dict[str, list[np.ndarray]] = {name: [] for name in linears}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, seen=inputs[name]: seen.append(args[0][0].numpy()))
        for name, linear in linears.items()
    ]
    for call in calls:
        _output(module, call)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def _next_layers(layer: nn.Module, calls: list[Call]) -> list[Call]:
    """The next layer is called with what a layer gives; all else stays, in a llama."""
    return [((_output(layer, call),), call[1]) for call in calls]
