"""Pruning metrics: how much a weight matters, from its value and the gradient of its block's output error.

The gradient enters as v = mean over samples of the squared per-sample gradient, so sqrt(v) is its root mean square
(LLM-Barber, arXiv 2408.10631, section 3.3). Scores are float32 (O, I), higher = more worth keeping.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from barber.runtime.tensors import Tensor


class Metric(Protocol):
    """Scores every weight of a linear, pruned or kept. `needs_gradient` is False if v is not looked at."""

    needs_gradient: ClassVar[bool]

    def score(self, weight_OI: Tensor, mean_squared_gradient_OI: Tensor | None) -> Tensor:
        """Score (O, I) in float32 from the weight and v; v is None where the metric needs no gradient."""
        ...


@dataclass(frozen=True)
class WeightGradient:
    """|W| * sqrt(v): the paper's metric."""

    needs_gradient: ClassVar[bool] = True

    def score(self, weight_OI: Tensor, mean_squared_gradient_OI: Tensor | None) -> Tensor:
        assert mean_squared_gradient_OI is not None
        return weight_OI.abs() * mean_squared_gradient_OI.sqrt()


@dataclass(frozen=True)
class Weight:
    """|W|: the paper's ablation without the gradient."""

    needs_gradient: ClassVar[bool] = False

    def score(self, weight_OI: Tensor, mean_squared_gradient_OI: Tensor | None) -> Tensor:
        return weight_OI.abs()


@dataclass(frozen=True)
class Gradient:
    """sqrt(v): the paper's ablation without the weight."""

    needs_gradient: ClassVar[bool] = True

    def score(self, weight_OI: Tensor, mean_squared_gradient_OI: Tensor | None) -> Tensor:
        assert mean_squared_gradient_OI is not None
        return mean_squared_gradient_OI.sqrt()
