"""What a method for rebuilding masks is, what it may look at, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from barber.patterns import Pattern
from barber.pruners import Pruned
from barber.statistics import InputStatistic
from barber.tensors import Tensor


@dataclass(frozen=True)
class Evidence:
    """What is known of a block's linears, by name, as far as the method asks for it.

    Args:
        gradient_OI: mean over samples of the squared gradient of the block's output error by the weight, at the dense
            weights.
        inputs: mean over samples of the method's statistic of the linear's inputs, with the initial masks in place;
            one and the same tensor for linears that share their input.
    """

    gradient_OI: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rebuilt:
    """A linear's rebuilt mask, and how many pairs of weights it exchanged.

    With Barber's granularity `block` a pair may span two linears: it counts where the weight grew.

    Args:
        mask_OI: True = pruned.
        num_exchanged: (), int64; it stays on the device.
        score: what was decided by; NaN or infinity in it stops the run.
    """

    mask_OI: Tensor
    num_exchanged: Tensor
    score: Tensor


class Rebuild(Protocol):
    """A method that exchanges pruned and kept weights of a block; `statistic` is what it needs of linears' inputs."""

    statistic: ClassVar[type[InputStatistic] | None]

    @property
    def needs_gradient(self) -> bool:
        """Whether it needs the gradient of the block's output error."""
        ...

    def check(self, pattern: Pattern) -> None:
        """Refuse what the pattern does not allow, with a UserError."""
        ...

    def weight(self, dense_OI: Tensor, pruned: Pruned) -> Tensor:
        """The weight that stays where it is kept: the dense one, or as the pruner updated it."""
        ...

    def rebuild(
        self, weight_OI: Mapping[str, Tensor], mask_OI: Mapping[str, Tensor], evidence: Evidence, pattern: Pattern
    ) -> dict[str, Rebuilt]:
        """New masks for a block's linears, given their weights and initial masks."""
        ...
