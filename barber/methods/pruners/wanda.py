"""Wanda: weights times the norm of their inputs (Sun et al., arXiv 2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

from barber.methods.block import BlockState, Pruned
from barber.methods.pruners.base import GradientOf
from barber.methods.statistics import InputStatistic, SecondMoment


@dataclass(frozen=True)
class Wanda:
    """Score |W| * sqrt(m), m the inputs' second moment; compared in every output row, or in N:M cells (eq. 1)."""

    statistic: ClassVar[type[InputStatistic] | None] = SecondMoment
    gradient: ClassVar[GradientOf] = None
    updates: ClassVar[bool] = False

    def prune(self, block: BlockState) -> dict[str, Pruned]:
        """The lowest scores go, row by row."""
        pruned = {}
        for name in block.names:
            weight_OI, norm_I = block.dense_OI[name], block.inputs[name].sqrt()
            pruned[name] = Pruned.masking(weight_OI, block.patterns[name].prune_rows(weight_OI.abs() * norm_I))
        return pruned
