"""What a method for the initial mask is, and what it returns."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from barber.methods.patterns import Pattern
from barber.methods.statistics import InputStatistic
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class Pruned:
    """A pruned linear: its mask (True = pruned) and its weight, zero where pruned; both (O, I)."""

    mask_OI: Tensor
    weight_OI: Tensor

    @classmethod
    def masking(cls, weight_OI: Tensor, mask_OI: Tensor) -> "Pruned":
        """The weight with the mask applied and nothing else changed."""
        return cls(mask_OI, weight_OI.masked_fill(mask_OI, 0))


GradientOf = Literal["layer", "loss"] | None


class Pruner(Protocol):
    """A method for the initial mask.

    `statistic` is what it needs of every linear's inputs; None: no data at all. `gradient` is of what it needs the
    gradients by the dense weights: the norm of the decoder `layer`'s output, the whole model's `loss`; None: nothing.
    """

    statistic: ClassVar[type[InputStatistic] | None]
    gradient: ClassVar[GradientOf]

    def prepare(self, mean: Tensor) -> Any:
        """What `prune` needs of the statistic's mean over samples; done once for all linears that share their input."""
        ...

    def prune(self, weight_OI: Tensor, prepared: Any, pattern: Pattern, gradient_OI: Tensor | None = None) -> Pruned:
        """Prune one linear.

        Args:
            weight_OI: its dense weight in float32.
            prepared: what `prepare` made of its inputs' statistic.
            gradient_OI: mean over samples of the squared gradient by the weight, for one sample each; float32. It is
                given to pruners whose `gradient` says of what.
        """
        ...
