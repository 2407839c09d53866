"""Sparsity by measured block errors: weights go where the error that they leave behind grows least.

A block's output is added to the residual stream h, which every later block sees through a norm: token by token its
direction counts, not its length. So what pruning a block does is measured as the mean over tokens of

    e_b(n) = |h' - h|^2 / |h|^2

with h the layer's output in the dense model and h' the same with n weights of block b pruned, all else dense. The ratio
is taken a token at a time: a few tokens of enormous h, as trained models have them, would otherwise set the scale of
all layers behind the one that makes them. To first order what later layers make of small errors is linear, and errors
of different blocks have nothing to do with each other, so that their squares add up. What is left is

    minimise  sum over b of e_b(n_b)  where  sum over b of n_b = n.

At its minimum one more weight costs the same in all blocks, e_b'(n_b) = lambda (Lagrange), or n_b is at an end of its
range. The e_b are known at a few n only. Their lower convex hulls, straight between these, turn the condition into an
order: all straight pieces of all blocks, by their slope, from the flattest on until n weights are pruned. Of one block
the pieces come in their own order, as slopes of a convex curve rise, so this is the exact minimum of the hulls' sum; it
is at most what the uniform allocation costs, which is among the measured ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from barber.errors import UserError, require_counts
from barber.methods.patterns import Exactly
from barber.model.decoder import Decoder
from barber.runtime.activations import Activations
from barber.runtime.numerics import FiniteChecks
from barber.runtime.tensors import Tensor
from barber.walk.allocation.base import Allocation, Setting, Watch, rounded
from barber.walk.allocation.survey import Surveyed, survey

# A block that has nothing left passes nothing on, which no error of its own tells.
_HIGHEST = 0.95

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class ErrorCurves(Allocation):
    """One sparsity a block (attention, MLP), such that the sum of the blocks' errors is least.

    Args:
        spread: how far a block's sparsity may be from the average; none is above 0.95.
        levels: at how many sparsities, evenly over this range, the errors are measured; a pass over the samples each.
    """

    spread: float = 0.2
    levels: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.spread < 1:
            raise UserError(f"must be above 0 and below 1, not {self.spread}", field="spread")
        require_counts(self, "levels", least=2)

    def allocate(self, setting: Setting, watch: Watch | None = None) -> dict[str, int]:
        """The number of weights that each linear loses; the linears of a block lose the same share."""
        blocks = [block for layer in Decoder(setting.model).layers for block in layer.blocks]
        sizes = setting.sizes
        curves = self.measure(setting, watch)
        ideal: dict[str, float] = {}
        for block, count in zip(blocks, cheapest(curves, setting.total), strict=True):
            names = [linear.name for linear in block.linears if linear.name in sizes]
            share = count / max(1, sum(sizes[name] for name in names))
            ideal |= {name: sizes[name] * share for name in names}
        return rounded(ideal, sizes, setting.total)

    def sparsities(self, sparsity: float) -> list[float]:
        """Where the errors are measured: evenly around a sparsity, which is among them."""
        steps = [2 * level / (self.levels - 1) - 1 for level in range(self.levels)]
        around = [min(max(sparsity + step * self.spread, 0.0), max(sparsity, _HIGHEST)) for step in steps]
        return sorted({*around, sparsity})

    def measure(self, setting: Setting, watch: Watch | None = None) -> list[Curve]:
        """The error of every block, in the order of the walk, at some numbers of pruned weights.

        Raises:
            NumericsError: NaN or infinite activations or errors.
        """
        layers, sparsities = Decoder(setting.model).layers, self.sparsities(setting.sparsity)
        outputs: list[Activations] = []
        curves: list[Curve] = []

        def look(surveyed: Surveyed) -> None:
            if not outputs:
                outputs.extend(setting.store.empty(*surveyed.before.shape) for _ in surveyed.layer.blocks)
            curves.extend(_measure_layer(setting, surveyed, outputs, sparsities))
            if watch is not None:
                watch(surveyed.index + 1, len(layers))

        survey(setting, look)
        return curves


def _measure_layer(
    setting: Setting, surveyed: Surveyed, outputs: list[Activations], sparsities: Sequence[float]
) -> list[Curve]:
    """The curves of a layer's blocks; `outputs` is room for what they give when dense."""
    layer, checks = surveyed.layer, FiniteChecks(setting.ranks)
    for batch, call in surveyed.calls():
        done: list[Tensor] = []
        for number in range(len(layer.blocks)):
            done.append(layer.run_block(number, call, done)[1])
            outputs[number][batch] = done[-1]
    counts: list[list[int]] = []
    errors: list[Tensor] = []
    for number, block in enumerate(layer.blocks):
        sizes = {one.name: one.weight_OI.numel() for one in block.linears if one.name not in setting.left_out}
        for sparsity in sparsities if sizes else (0.0,):
            pruned = {name: int(size * sparsity) for name, size in sizes.items()}
            counts.append([number, sum(pruned.values())])
            pruned_OI = {name: _pruned(surveyed, name, size) for name, size in pruned.items()}
            with block.using({**surveyed.dense_OI, **pruned_OI}, setting.arithmetic):
                errors.append(_sum_of_errors(setting, surveyed, outputs, number))
            checks.order({f"{layer.name}.{block.name}: the error at sparsity {sparsity:.2f}": errors[-1]})
    total_P = setting.ranks.all_reduce_sum(torch.stack(errors)) / setting.tokens_NL.numel()
    checks.require()
    curves: list[Curve] = [[] for _ in layer.blocks]
    for (number, count), error in zip(counts, total_P.tolist(), strict=True):
        curves[number].append((count, error if count else 0.0))
    return curves


def _pruned(surveyed: Surveyed, name: str, count: int) -> Tensor:
    """A linear's weight without its `count` least worthy weights."""
    mask_OI = Exactly(count).prune_rows(surveyed.score_OI(name))
    return surveyed.dense_OI[name].masked_fill(mask_OI, 0)


def _sum_of_errors(setting: Setting, surveyed: Surveyed, outputs: Sequence[Activations], number: int) -> Tensor:
    """The sum over this process's tokens of the relative squared error of the layer's output: (), float64.

    Block `number` has the weights that it has now, the others answer what they give when dense.
    """
    total = torch.zeros((), dtype=torch.float64, device=setting.device)
    for batch, call in surveyed.calls():
        done = [kept[batch] for kept in outputs]
        done[number] = surveyed.layer.run_block(number, call, done[:number])[1]
        dense_BLD = surveyed.after[batch].float()
        difference_BLD = surveyed.layer.finish(call, done).float() - dense_BLD
        size_BL = dense_BLD.square().sum(dim=-1).clamp(min=1e-30)
        total += (difference_BLD.square().sum(dim=-1) / size_BL).sum(dtype=torch.float64)
    return total


def cheapest(curves: Sequence[Curve], total: int) -> list[int]:
    """How many weights each block loses, such that the sum of the curves' lower convex hulls is least.

    Args:
        curves: of each block, the error at some numbers of pruned weights.
        total: of all blocks; where it is out of reach the result adds up to the nearest number that is not.
    """
    hulls = [lower_hull(curve) for curve in curves]
    counts = [hull[0][0] for hull in hulls]
    missing = total - sum(counts)
    pieces = [
        ((right[1] - left[1]) / (right[0] - left[0]), number, left[0], right[0] - left[0])
        for number, hull in enumerate(hulls)
        for left, right in pairwise(hull)
    ]
    for _, number, _, width in sorted(pieces):
        taken = min(width, max(missing, 0))
        counts[number] += taken
        missing -= taken
    return counts


def lower_hull(curve: Curve) -> Curve:
    """The corners of the greatest convex function below all points, by ascending number of weights."""
    hull: Curve = []
    for count, error in sorted(curve):
        if hull and hull[-1][0] == count:
            continue
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], (count, error)):
            hull.pop()
        hull.append((count, error))
    return hull


def _is_above(point: tuple[int, float], left: tuple[int, float], right: tuple[int, float]) -> bool:
    """Whether a point is on or above the line between two others."""
    return (point[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (point[0] - left[0])
