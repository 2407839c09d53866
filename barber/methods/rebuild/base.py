"""What a step of the rebuilding is, what it asks for, and what it returns."""

from dataclasses import dataclass
from typing import Protocol

from barber.methods.block import BlockState, Pruned
from barber.methods.patterns import Pattern
from barber.methods.statistics import InputStatistic
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class Rebuilt:
    """What a step makes of a linear, and how many pairs of weights it exchanged.

    With Barber's granularity `block` a pair may span two linears: it counts where the weight grew.

    Args:
        pruned: the new mask and weight.
        num_exchanged: (), int64; it stays on the device.
        score: what was decided by; NaN or infinity in it stops the run.
    """

    pruned: Pruned
    num_exchanged: Tensor
    score: Tensor


@dataclass(frozen=True)
class Needs:
    """What a step is given to go by.

    A step sees the whole block each time. Where it needs a statistic of inputs it is the turn of one stage after the
    other, the linears that are fed before any of them has answered, and the next stage is fed by their new weights;
    otherwise it is the turn of all linears at once.

    Args:
        statistic: of the linears' inputs.
        gradient: of the block's output error, by the weights.
        dense: what the dense model feeds the linears, too.
        trial: the block, to run it.
        passes: how often the step is taken, one time after the other.
    """

    statistic: type[InputStatistic] | None = None
    gradient: bool = False
    dense: bool = False
    trial: bool = False
    passes: int = 1


class Rebuild(Protocol):
    """A step: it exchanges pruned and kept weights of a block, or gives the kept ones new values."""

    @property
    def needs(self) -> Needs:
        """What it goes by."""
        ...

    def check(self, pattern: Pattern) -> None:
        """Refuse what the pattern does not allow, with a UserError."""
        ...

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        """New masks and weights for linears of a block, given its dense weights, and as the step before left it."""
        ...
