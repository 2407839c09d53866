"""GBLM-Pruner: gradients of the language-model loss beside Wanda's score (Das et al., arXiv 2311.04902)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from barber.errors import require_not_negative
from barber.methods.block import BlockState, Pruned
from barber.methods.pruners.base import GradientOf
from barber.methods.statistics import InputStatistic, SecondMoment

_SAMPLES_OF_THE_AUTHORS = 128


@dataclass(frozen=True)
class GBLM:
    """Score |W| * (sqrt(m) + a G), m the inputs' second moment; compared in every output row, or in N:M cells.

    The authors' G is the root of the sum over their 128 samples of the squared gradient g of one sample's loss by the
    weight, taken once, at the dense model (their L2 variant). That sum grows with the number of samples, while m is a
    mean; here G = sqrt(128 * mean of g^2): the authors' with 128 samples, and the two terms weigh as much against each
    other with any other number.

    Args:
        gradient_scale: a.
    """

    gradient_scale: float = 100.0

    statistic: ClassVar[type[InputStatistic] | None] = SecondMoment
    gradient: ClassVar[GradientOf] = "loss"
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_not_negative(self, "gradient_scale")

    def prune(self, block: BlockState) -> dict[str, Pruned]:
        """The lowest scores go, row by row."""
        scale = self.gradient_scale * math.sqrt(_SAMPLES_OF_THE_AUTHORS)
        pruned = {}
        for name in block.names:
            weight_OI, norm_I, gradient_OI = block.dense_OI[name], block.inputs[name].sqrt(), block.gradient_OI[name]
            score_OI = weight_OI.abs() * (norm_I + scale * gradient_OI.sqrt())
            pruned[name] = Pruned.masking(weight_OI, block.patterns[name].prune_rows(score_OI))
        return pruned
