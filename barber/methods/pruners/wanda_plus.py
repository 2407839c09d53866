"""Wanda++'s regional gradient score (Yang et al., arXiv 2503.04992)."""

from dataclasses import dataclass
from typing import ClassVar

from barber.errors import require_not_negative
from barber.methods.block import BlockState, Pruned
from barber.methods.pruners.base import GradientOf
from barber.methods.statistics import InputStatistic, SecondMoment


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
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_not_negative(self, "gradient_scale")

    def prune(self, block: BlockState) -> dict[str, Pruned]:
        """The lowest scores go, row by row."""
        pruned = {}
        for name in block.names:
            weight_OI, norm_I, gradient_OI = block.dense_OI[name], block.inputs[name].sqrt(), block.gradient_OI[name]
            score_OI = weight_OI.abs() * (norm_I + self.gradient_scale * gradient_OI.sqrt())
            pruned[name] = Pruned.masking(weight_OI, block.patterns[name].prune_rows(score_OI))
        return pruned
