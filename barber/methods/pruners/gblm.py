"""GBLM-Pruner: gradients of the language-model loss beside Wanda's score (Das et al., arXiv 2311.04902)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from barber.errors import require_not_negative
from barber.methods.patterns import Pattern
from barber.methods.pruners.base import GradientOf, Pruned
from barber.methods.statistics import InputStatistic, SecondMoment
from barber.runtime.tensors import Tensor

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

    def __post_init__(self) -> None:
        require_not_negative(self, "gradient_scale")

    def prepare(self, mean_I: Tensor) -> Tensor:
        """The norm of every input: (I,)."""
        return mean_I.sqrt()

    def prune(self, weight_OI: Tensor, prepared: Tensor, pattern: Pattern, gradient_OI: Tensor | None = None) -> Pruned:
        assert gradient_OI is not None
        scale = self.gradient_scale * math.sqrt(_SAMPLES_OF_THE_AUTHORS)
        score_OI = weight_OI.abs() * (prepared + scale * gradient_OI.sqrt())
        return Pruned.masking(weight_OI, pattern.prune_rows(score_OI))
