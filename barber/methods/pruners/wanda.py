"""Wanda: weights times the norm of their inputs (Sun et al., arXiv 2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

from barber.methods.patterns import Pattern
from barber.methods.pruners.base import GradientOf, Pruned
from barber.methods.statistics import InputStatistic, SecondMoment
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class Wanda:
    """Score |W| * sqrt(m), m the inputs' second moment; compared in every output row, or in N:M cells (eq. 1)."""

    statistic: ClassVar[type[InputStatistic] | None] = SecondMoment
    gradient: ClassVar[GradientOf] = None

    def prepare(self, mean_I: Tensor) -> Tensor:
        """The norm of every input: (I,)."""
        return mean_I.sqrt()

    def prune(self, weight_OI: Tensor, prepared: Tensor, pattern: Pattern, gradient_OI: Tensor | None = None) -> Pruned:
        return Pruned.masking(weight_OI, pattern.prune_rows(weight_OI.abs() * prepared))
