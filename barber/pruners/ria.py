"""RIA: relative importance and activations (Zhang et al., ICLR 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from barber.errors import UserError
from barber.patterns import Pattern
from barber.pruners.base import GradientOf, Pruned
from barber.statistics import InputStatistic, SecondMoment
from barber.tensors import Tensor


@dataclass(frozen=True)
class RIA:
    """Score (|W_ij| / sum of its row + |W_ij| / sum of its column) * sqrt(m_j)^a, m the inputs' second moment.

    A weight that is small, but large beside what else its input or its output has, stays.

    Args:
        exponent: a.
        compare: weights of a `row`, or of the whole `matrix` as the authors' code does; with N:M inside the cells.
    """

    exponent: float = 0.5
    compare: Literal["row", "matrix"] = "row"

    statistic: ClassVar[type[InputStatistic] | None] = SecondMoment
    gradient: ClassVar[GradientOf] = None

    def __post_init__(self) -> None:
        if self.exponent < 0:
            raise UserError(f"must be at least 0, not {self.exponent}", field="exponent")

    def prepare(self, mean_I: Tensor) -> Tensor:
        """The norm of every input to the power of a: (I,)."""
        return mean_I.sqrt() ** self.exponent

    def prune(self, weight_OI: Tensor, prepared: Tensor, pattern: Pattern, gradient_OI: Tensor | None = None) -> Pruned:
        size_OI = weight_OI.abs()
        # Where all weights of a row or a column are zero there is nothing to be large beside.
        rows_O1 = size_OI.sum(dim=1, keepdim=True).clamp(min=1e-30)
        columns_1I = size_OI.sum(dim=0, keepdim=True).clamp(min=1e-30)
        score_OI = (size_OI / columns_1I + size_OI / rows_O1) * prepared
        select = pattern.prune_rows if self.compare == "row" else pattern.prune_whole
        return Pruned.masking(weight_OI, select(score_OI))
