"""LLM-Barber: exchange pruned and kept weights by |weight| x gradient of their block's output error.

Source: arXiv 2408.10631, sections 3.2 and 3.3; where the paper leaves something open, the authors' implementation
decides, less its drifting sparsity (with alpha = 1 and with ties its thresholds exchange unequal numbers).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from barber import masks
from barber.errors import UserError
from barber.metrics import Metric, WeightGradient
from barber.patterns import NM, Granularity, Pattern
from barber.pruners import Pruned
from barber.rebuild.base import Evidence, Rebuilt
from barber.statistics import InputStatistic
from barber.tensors import Tensor


@dataclass(frozen=True)
class Barber:
    """Rebuild masks by exchanging the pairs of pruned and kept weights that are in the wrong order.

    Args:
        alpha: the mask rebuilding ratio: the share of the pairs worth exchanging that is exchanged, from 0 to 1.
        granularity: which weights compete: those of an `output` row, an `input` column, a `layer` (one linear), or
            all linears of a `block`. N:M patterns need `output`.
        retain_reconstruction: keep the weights as the pruner updated them (SparseGPT) instead of the dense ones.
        nm_exchange: for N:M, `row` pairs weights over the output row (the paper's), `cell` only inside a cell and
            only while the score gains.
        metric: what the weights are compared by.
    """

    alpha: float = 0.1
    granularity: Granularity = "output"
    retain_reconstruction: bool = False
    nm_exchange: Literal["row", "cell"] = "row"
    metric: Metric = field(default_factory=WeightGradient)

    statistic: ClassVar[type[InputStatistic] | None] = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"must be from 0 to 1, not {self.alpha}", field="alpha")

    def check(self, pattern: Pattern) -> None:
        """Refuse a granularity that the pattern does not allow.

        Raises:
            UserError: a granularity other than `output` with N:M.
        """
        if isinstance(pattern, NM) and self.granularity != "output":
            raise UserError(
                f"must be output with an N:M pattern (here {pattern}), not {self.granularity}", field="granularity"
            )

    def weight(self, dense_OI: Tensor, pruned: Pruned) -> Tensor:
        """The weight W that is scored and, where kept, stays: dense, or reconstructed where the pruner kept it."""
        if self.retain_reconstruction:
            return torch.where(pruned.mask_OI, dense_OI, pruned.weight_OI)
        return dense_OI

    @property
    def needs_gradient(self) -> bool:
        """As the metric does."""
        return self.metric.needs_gradient

    def rebuild(
        self, weight_OI: Mapping[str, Tensor], mask_OI: Mapping[str, Tensor], evidence: Evidence, pattern: Pattern
    ) -> dict[str, Rebuilt]:
        """Score the weights by the metric, and exchange."""
        gradient_OI = evidence.gradient_OI
        score_OI = {name: self.metric.score(weight_OI[name], gradient_OI.get(name)) for name in mask_OI}
        return self.exchange(score_OI, mask_OI, pattern)

    def exchange(
        self, score_OI: Mapping[str, Tensor], pruned_OI: Mapping[str, Tensor], pattern: Pattern
    ) -> dict[str, Rebuilt]:
        """Rebuild the masks of a block's linears, given the scores (O, I) and masks (O, I) of each."""
        if self.granularity == "block":
            joined_1M, _ = masks.exchange(_joined(score_OI), _joined(pruned_OI), self.alpha)
            parts = torch.split(joined_1M[0], [mask_OI.numel() for mask_OI in pruned_OI.values()])
            rebuilt_OI = {
                name: part.view_as(mask_OI) for part, (name, mask_OI) in zip(parts, pruned_OI.items(), strict=True)
            }
            return {
                name: Rebuilt(rebuilt_OI[name], (mask_OI & ~rebuilt_OI[name]).sum(), score_OI[name])
                for name, mask_OI in pruned_OI.items()
            }
        return {name: self._exchange_linear(score_OI[name], pruned_OI[name], pattern) for name in pruned_OI}

    def _exchange_linear(self, score_OI: Tensor, pruned_OI: Tensor, pattern: Pattern) -> Rebuilt:
        if isinstance(pattern, NM):
            by = masks.exchange_cells_by_row if self.nm_exchange == "row" else masks.exchange_inside_cells
            mask_OI, count_G = by(score_OI, pruned_OI, self.alpha, pattern.m)
        elif self.granularity == "output":
            mask_OI, count_G = masks.exchange(score_OI, pruned_OI, self.alpha)
        elif self.granularity == "input":
            mask_IO, count_G = masks.exchange(score_OI.T, pruned_OI.T, self.alpha)
            mask_OI = mask_IO.T.contiguous()
        else:
            mask_1M, count_G = masks.exchange(score_OI.reshape(1, -1), pruned_OI.reshape(1, -1), self.alpha)
            mask_OI = mask_1M.view_as(pruned_OI)
        return Rebuilt(mask_OI, count_G.sum(), score_OI)


def _joined(matrices_OI: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([matrix_OI.flatten() for matrix_OI in matrices_OI.values()])[None]
