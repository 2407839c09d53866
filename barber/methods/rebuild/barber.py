"""LLM-Barber: exchange pruned and kept weights by |weight| x gradient of their block's output error.

Source: arXiv 2408.10631, sections 3.2 and 3.3; where the paper leaves something open, the authors' implementation
decides, less its drifting sparsity (with alpha = 1 and with ties its thresholds exchange unequal numbers).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from barber.errors import UserError, require_counts
from barber.methods import masks
from barber.methods.block import BlockState, Pruned, Trial
from barber.methods.metrics import Metric, WeightGradient
from barber.methods.patterns import NM, Granularity, Pattern
from barber.methods.rebuild.base import Needs, Rebuilt
from barber.runtime.tensors import Tensor

# What `auto` chooses from, ascending: the first one exchanges nothing, and wins where nothing else is better.
ALPHAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)

# A linear's new mask, and how many pairs were exchanged: (), int64.
_Exchanged = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Barber:
    """Rebuild masks by exchanging the pairs of pruned and kept weights that are in the wrong order.

    With alpha `auto` the block itself decides, by its output error on the last quarter of the calibration samples: the
    best of `ALPHAS` for all linears together, then, linear by linear, a neighbour of it where that is better still. As
    0 is among them, no block ends up worse on these samples than with nothing exchanged. They are held out from this
    choice only: the gradients, like the initial mask, are of all samples, these included.

    Args:
        alpha: the mask rebuilding ratio: the share of the pairs worth exchanging that is exchanged, from 0 to 1; or
            `auto`.
        granularity: which weights compete: those of an `output` row, an `input` column, a `layer` (one linear), or
            all linears of a `block`, whose alpha is one. N:M patterns need `output`.
        retain_reconstruction: keep the weights as the pruner updated them (SparseGPT) instead of the dense ones.
        nm_exchange: for N:M, `row` pairs weights over the output row (the paper's), `cell` only inside a cell and
            only while the score gains.
        metric: what the weights are compared by.
        rounds: how often the step is taken, each time with the gradient taken anew.
    """

    alpha: float | Literal["auto"] = 0.1
    granularity: Granularity = "output"
    retain_reconstruction: bool = False
    nm_exchange: Literal["row", "cell"] = "row"
    metric: Metric = field(default_factory=WeightGradient)
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise UserError(f"must be from 0 to 1, not {self.alpha}", field="alpha")
        require_counts(self, "rounds")

    def check(self, pattern: Pattern) -> None:
        """Refuse a granularity that the pattern does not allow.

        Raises:
            UserError: a granularity other than `output` with N:M.
        """
        if isinstance(pattern, NM) and self.granularity != "output":
            raise UserError(
                f"must be output with an N:M pattern (here {pattern}), not {self.granularity}", field="granularity"
            )

    @property
    def needs(self) -> Needs:
        """The gradient, where the metric does; the block, where that decides how much is exchanged."""
        return Needs(gradient=self.metric.needs_gradient, trial=self.alpha == "auto", passes=self.rounds)

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        """Score the weights by the metric, and exchange."""
        names, gradient_OI = block.names, block.gradient_OI
        weight_OI = {name: self._weight(block.dense_OI[name], block.pruned[name]) for name in names}
        score_OI = {name: self.metric.score(weight_OI[name], gradient_OI.get(name)) for name in names}
        mask_OI = {name: block.pruned[name].mask_OI for name in names}
        if self.alpha == "auto":
            assert block.trial is not None
            exchanged = self._tried(weight_OI, score_OI, mask_OI, block.trial, block.patterns)
        else:
            exchanged = self._exchanged(score_OI, mask_OI, block.patterns, self.alpha)
        return {
            name: Rebuilt(Pruned.masking(weight_OI[name], mask_OI), count, score_OI[name])
            for name, (mask_OI, count) in exchanged.items()
        }

    def _weight(self, dense_OI: Tensor, pruned: Pruned) -> Tensor:
        """The weight W that is scored and, where kept, stays: dense, or reconstructed where the pruner kept it."""
        if self.retain_reconstruction:
            return torch.where(pruned.mask_OI, dense_OI, pruned.weight_OI)
        return dense_OI

    def _tried(
        self,
        weight_OI: Mapping[str, Tensor],
        score_OI: Mapping[str, Tensor],
        mask_OI: Mapping[str, Tensor],
        trial: Trial,
        patterns: Mapping[str, Pattern],
    ) -> dict[str, _Exchanged]:
        """Exchange as much as serves the block best on the samples held out."""
        held_out = slice(trial.num_samples - max(1, trial.num_samples // 4), trial.num_samples)

        def loss(exchanged: Mapping[str, _Exchanged]) -> float:
            masked_OI = {name: weight_OI[name].masked_fill(mask_OI, 0) for name, (mask_OI, _) in exchanged.items()}
            return trial.loss(masked_OI, held_out).item()

        chosen = 0
        best = self._exchanged(score_OI, mask_OI, patterns, ALPHAS[chosen])
        lowest = loss(best)
        for index in range(1, len(ALPHAS)):
            candidate = self._exchanged(score_OI, mask_OI, patterns, ALPHAS[index])
            if (found := loss(candidate)) < lowest:
                chosen, best, lowest = index, candidate, found
        if self.granularity == "block":
            return best
        for name in mask_OI:
            for index in (chosen - 1, chosen + 1):
                if 0 <= index < len(ALPHAS):
                    linear = self._exchanged_linear(score_OI[name], mask_OI[name], patterns[name], ALPHAS[index])
                    candidate = best | {name: linear}
                    if (found := loss(candidate)) < lowest:
                        best, lowest = candidate, found
        return best

    def _exchanged(
        self,
        score_OI: Mapping[str, Tensor],
        mask_OI: Mapping[str, Tensor],
        patterns: Mapping[str, Pattern],
        alpha: float,
    ) -> dict[str, _Exchanged]:
        """The new masks of a block's linears, given the scores (O, I) and masks (O, I) of each."""
        if self.granularity != "block":
            return {
                name: self._exchanged_linear(score_OI[name], before_OI, patterns[name], alpha)
                for name, before_OI in mask_OI.items()
            }
        joined_1M, _ = masks.exchange(_joined(score_OI), _joined(mask_OI), alpha)
        parts = torch.split(joined_1M[0], [before_OI.numel() for before_OI in mask_OI.values()])
        exchanged = {}
        for part, (name, before_OI) in zip(parts, mask_OI.items(), strict=True):
            after_OI = part.view_as(before_OI)
            exchanged[name] = after_OI, (before_OI & ~after_OI).sum()
        return exchanged

    def _exchanged_linear(self, score_OI: Tensor, before_OI: Tensor, pattern: Pattern, alpha: float) -> _Exchanged:
        if isinstance(pattern, NM):
            by = masks.exchange_cells_by_row if self.nm_exchange == "row" else masks.exchange_inside_cells
            mask_OI, count_G = by(score_OI, before_OI, alpha, pattern.m)
        elif self.granularity == "output":
            mask_OI, count_G = masks.exchange(score_OI, before_OI, alpha)
        elif self.granularity == "input":
            mask_IO, count_G = masks.exchange(score_OI.T, before_OI.T, alpha)
            mask_OI = mask_IO.T.contiguous()
        else:
            mask_1M, count_G = masks.exchange(score_OI.reshape(1, -1), before_OI.reshape(1, -1), alpha)
            mask_OI = mask_1M.view_as(before_OI)
        return mask_OI, count_G.sum()


def _joined(matrices_OI: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([matrix_OI.flatten() for matrix_OI in matrices_OI.values()])[None]
