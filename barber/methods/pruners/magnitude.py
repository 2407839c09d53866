"""Magnitude pruning: the smallest weights go. It needs no data."""

from dataclasses import dataclass
from typing import ClassVar

from barber.methods.patterns import Pattern
from barber.methods.pruners.base import GradientOf, Pruned
from barber.methods.statistics import InputStatistic
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class Magnitude:
    """Score |W|, compared over a whole linear, or inside the cells of an N:M pattern."""

    statistic: ClassVar[type[InputStatistic] | None] = None
    gradient: ClassVar[GradientOf] = None

    def prepare(self, mean: Tensor) -> None:
        return None

    def prune(self, weight_OI: Tensor, prepared: None, pattern: Pattern, gradient_OI: Tensor | None = None) -> Pruned:
        return Pruned.masking(weight_OI, pattern.prune_whole(weight_OI.abs()))
