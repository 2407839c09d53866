"""A block as the methods see it: its linears, what each is by now, and what is known of those whose turn it is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from barber.errors import NumericsError
from barber.methods.patterns import Pattern
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
class BlockState:
    """A block in the middle of the walk.

    What a method sees is the whole block, by the names of its linears. It gives new masks and weights to those whose
    turn it is, and may give them to others of the block as well, whose inputs it knows nothing of.

    Args:
        names: the linears whose turn it is, in the order in which they run.
        dense_OI: the dense weights of all linears, float32.
        pruned: all linears as they are now; empty where there is no initial mask yet.
        patterns: what the masks of all linears look like.
        inputs: of those whose turn it is, the mean over samples of the statistic that the method asks for, with the
            weights as they are so far; one and the same tensor for linears that share their input.
        gradient_OI: mean over samples of the squared gradient that the method asks for, by the weight, at the dense
            weights: of the block's output error, of the norm of the layer's output, or of the model's loss.
        drift: for steps that follow the dense model (asymmetric calibration): mean over samples of 2 (x' - x) x^T,
            summed over tokens, with x' what the dense model feeds the linear and x what it is fed now: (I, I). One
            tensor where inputs are one.
        residual: likewise, for linears whose output is added to the residual stream as it is: 2 (h' - h) x^T, with h'
            what the dense model has in the stream before that and h what is there now: (O, I).
        trial: the block itself, to run it.
    """

    names: Sequence[str]
    dense_OI: Mapping[str, Tensor]
    patterns: Mapping[str, Pattern]
    pruned: Mapping[str, Pruned] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    gradient_OI: Mapping[str, Tensor] = field(default_factory=dict)
    drift: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    trial: Trial | None = None

    def by_input(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Every statistic of inputs, and the linears that share it: what costs I^3 is done once for all of them."""
        groups: dict[int, list[str]] = {}
        for name in self.names:
            groups.setdefault(id(self.inputs[name]), []).append(name)
        for group in groups.values():
            yield self.inputs[group[0]], group

    def made_up_for(self, name: str, follow: float) -> Tensor:
        """What following the dense model adds to the product of a linear's outputs with its inputs: (O, I).

        The outputs are to be those on inputs that a share `follow` of the drift is taken back from, and where they
        are added to the residual stream, they are to take as much of the drift there back.
        """
        product_OI = self.dense_OI[name] @ self.drift[name]
        if name in self.residual:
            product_OI += self.residual[name]
        return product_OI * follow


@contextmanager
def named(linear: str) -> Iterator[None]:
    """Say which linear a NumericsError is about."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{linear}: {error}") from error
