"""Wanda++'s regional gradient score (Yang et al., arXiv 2503.04992)."""

from dataclasses import dataclass
from typing import ClassVar

from barber.errors import require_not_negative
from barber.methods.patterns import Pattern
from barber.methods.pruners.base import GradientOf, Pruned
from barber.methods.statistics import InputStatistic, SecondMoment
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class WandaPlus:
    """Score |W| * (sqrt(m) + a G), m the inputs' second moment; compared in every output row, or in N:M cells.

    G is the root of the mean over samples of the squared gradient of ||layer(x)||_2 by the weight: the norm of what the
    dense decoder layer gives for one sample, over its tokens and channels. This is the score without the paper's
    regional optimisation, which updates the weights.

    Args:
        gradient_scale: a.
    """

    gradient_scale: float = 100.0

    statistic: ClassVar[type[InputStatistic] | None] = SecondMoment
    gradient: ClassVar[GradientOf] = "layer"

    def __post_init__(self) -> None:
        require_not_negative(self, "gradient_scale")

    def prepare(self, mean_I: Tensor) -> Tensor:
        """The norm of every input: (I,)."""
        return mean_I.sqrt()

    def prune(self, weight_OI: Tensor, prepared: Tensor, pattern: Pattern, gradient_OI: Tensor | None = None) -> Pruned:
        assert gradient_OI is not None
        score_OI = weight_OI.abs() * (prepared + self.gradient_scale * gradient_OI.sqrt())
        return Pruned.masking(weight_OI, pattern.prune_rows(score_OI))
