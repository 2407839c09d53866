"""RIA: relative importance and activations, with channel permutation for N:M (Zhang et al., ICLR 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from barber.errors import require_not_negative
from barber.methods.block import BlockState, Pruned
from barber.methods.patterns import NM, Pattern
from barber.methods.pruners.base import GradientOf
from barber.methods.statistics import InputStatistic, SecondMoment
from barber.runtime.tensors import Tensor, batches

# Scores that are compared at a time when inputs are assigned to cells.
_AT_A_TIME = 2**24


@dataclass(frozen=True)
class RIA:
    """Score (|W_ij| / sum of its row + |W_ij| / sum of its column) * sqrt(m_j)^a, m the inputs' second moment.

    A weight that is small, but large beside what else its input or its output has, stays.

    Args:
        exponent: a.
        compare: weights of a `row`, or of the whole `matrix` as the authors' code does; with N:M inside the cells.
        permute: make up the N:M cells of any inputs, so that more of the score is kept (the paper's channel
            permutation). A kernel for the pattern then needs the linear's inputs permuted when it runs; the weights
            stay in their order, in which the mask is not N:M.
    """

    exponent: float = 0.5
    compare: Literal["row", "matrix"] = "row"
    permute: bool = False

    statistic: ClassVar[type[InputStatistic] | None] = SecondMoment
    gradient: ClassVar[GradientOf] = None
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_not_negative(self, "exponent")

    def prune(self, block: BlockState) -> dict[str, Pruned]:
        """The lowest scores go, linear by linear."""
        return {
            name: self._prune(block.dense_OI[name], block.inputs[name].sqrt() ** self.exponent, block.patterns[name])
            for name in block.names
        }

    def _prune(self, weight_OI: Tensor, importance_I: Tensor, pattern: Pattern) -> Pruned:
        size_OI = weight_OI.abs()
        # Where all weights of a row or a column are zero there is nothing to be large beside.
        rows_O1 = size_OI.sum(dim=1, keepdim=True).clamp(min=1e-30)
        columns_1I = size_OI.sum(dim=0, keepdim=True).clamp(min=1e-30)
        score_OI = (size_OI / columns_1I + size_OI / rows_O1) * importance_I
        if self.permute and isinstance(pattern, NM):
            order_I = permutation(score_OI, pattern)
            mask_OI = torch.empty_like(weight_OI, dtype=torch.bool)
            mask_OI[:, order_I] = pattern.prune_rows(score_OI[:, order_I])
            return Pruned.masking(weight_OI, mask_OI)
        select = pattern.prune_rows if self.compare == "row" else pattern.prune_whole
        return Pruned.masking(weight_OI, select(score_OI))


def permutation(score_OI: Tensor, pattern: NM) -> Tensor:
    """An order of the inputs whose cells of m neighbours keep much of the score: (I,), int64.

    The inputs with the highest scores are dealt out to the cells, to and fro. Then the first, second, ... members of
    all cells are assigned to the cells anew, as keeps the most; that never keeps less.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    m, n = pattern.m, pattern.n
    dealt_MC = score_OI.sum(dim=0).argsort(descending=True, stable=True).view(m, -1)
    dealt_MC[1::2] = dealt_MC[1::2].flip(1)
    for member in range(m):
        others_MC = torch.cat([dealt_MC[:member], dealt_MC[member + 1 :]])
        # With one more member a cell keeps its n - 1 best others in any case, and the better of the next one and it.
        bar_OC = score_OI[:, others_MC].topk(n, dim=1).values[:, -1]
        kept_CC = _summed_maxima(bar_OC, score_OI[:, dealt_MC[member]])
        _, chosen_C = linear_sum_assignment(kept_CC.cpu().numpy(), maximize=True)
        dealt_MC[member] = dealt_MC[member, torch.from_numpy(chosen_C).to(dealt_MC.device)]
    return dealt_MC.T.reshape(-1)


def _summed_maxima(bar_OC: Tensor, score_OD: Tensor) -> Tensor:
    """sum over O of max(bar, score), for all pairs: (C, D)."""
    at_a_time = max(1, _AT_A_TIME // score_OD.numel())
    parts = (bar_OC[:, part, None] for part in batches(bar_OC.shape[1], at_a_time))
    return torch.cat([torch.maximum(part_OC1, score_OD[:, None]).sum(dim=0) for part_OC1 in parts])
