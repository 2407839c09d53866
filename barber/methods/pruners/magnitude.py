"""Magnitude pruning: the smallest weights go. It needs no data."""

from dataclasses import dataclass
from typing import ClassVar

from barber.methods.block import BlockState, Pruned
from barber.methods.pruners.base import GradientOf
from barber.methods.statistics import InputStatistic


@dataclass(frozen=True)
class Magnitude:
    """Score |W|, compared over a whole linear, or inside the cells of an N:M pattern."""

    statistic: ClassVar[type[InputStatistic] | None] = None
    gradient: ClassVar[GradientOf] = None
    updates: ClassVar[bool] = False

    def prune(self, block: BlockState) -> dict[str, Pruned]:
        """The smallest weights go, linear by linear."""
        weight_OI, patterns = block.dense_OI, block.patterns
        return {
            name: Pruned.masking(weight_OI[name], patterns[name].prune_whole(weight_OI[name].abs()))
            for name in block.names
        }
