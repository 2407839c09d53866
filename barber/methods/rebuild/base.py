"""What a step of the rebuilding is, what it may look at, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruned
from barber.methods.statistics import InputStatistic
from barber.runtime.tensors import Tensor


class Trial(Protocol):
    """A block that can be run with any weights on the inputs that it has, against its dense output.

    Losses are those of samples: mean over tokens and channels of the squared difference of the block's outputs.
    """

    @property
    def num_samples(self) -> int:
        """Calibration samples of all processes."""
        ...

    def loss(self, weight_OI: Mapping[str, Tensor], samples: slice) -> Tensor:
        """The mean loss over some samples, counted over all processes: (), float64.

        Linears that are not named have the weights that they have now.
        """
        ...

    def gradient(
        self, weight_OI: Mapping[str, Tensor], samples: slice, follow: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """That, and its gradient by every weight of the block: (O, I), float32.

        With `follow` the output that is aimed at lies that share of the way to the one that takes the residual stream
        to where the dense model has it; for steps that follow the dense model.
        """
        ...


@dataclass(frozen=True)
class Evidence:
    """What is known of a block's linears, by name, as far as the step asks for it.

    Args:
        gradient_OI: mean over samples of the squared gradient of the block's output error by the weight, at the dense
            weights.
        inputs: mean over samples of the step's statistic of the linear's inputs, with the weights as they are so far;
            one and the same tensor for linears that share their input.
        drift: for steps that follow the dense model: mean over samples of 2 (x' - x) x^T, summed over tokens, with x'
            what the dense model feeds the linear and x what it is fed now: (I, I). One tensor where inputs are one.
        residual: likewise, for linears whose output is added to the residual stream as it is: 2 (h' - h) x^T, with h'
            what the dense model has in the stream before that and h what is there now: (O, I).
        trial: the block itself.
    """

    gradient_OI: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    drift: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    trial: Trial | None = None

    def made_up_for(self, name: str, dense_OI: Tensor, follow: float) -> Tensor:
        """What following the dense model adds to the product of a linear's outputs with its inputs: (O, I).

        The outputs are to be those on inputs that a share `follow` of the drift is taken back from, and where they
        are added to the residual stream, they are to take as much of the drift there back.
        """
        product_OI = dense_OI @ self.drift[name]
        if name in self.residual:
            product_OI += self.residual[name]
        return product_OI * follow


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

    A step that needs a statistic of inputs is given the linears that share theirs by themselves, the next ones being
    fed by their new weights; any other step is given the block's all at once.

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

    def rebuild(
        self,
        dense_OI: Mapping[str, Tensor],
        pruned: Mapping[str, Pruned],
        evidence: Evidence,
        pattern: Pattern,
    ) -> dict[str, Rebuilt]:
        """New masks and weights of linears, given their dense weights, and as the step before left them."""
        ...
