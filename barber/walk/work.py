"""A layer in progress: what the parts of the walk hand to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from barber.errors import BarberError
from barber.methods.block import Pruned
from barber.model.blocks import Block, Layer
from barber.runtime.activations import Activations
from barber.runtime.tensors import Tensor, by_sample


@dataclass
class LayerWork:
    """A layer in progress.

    Args:
        targets: room for the dense outputs of the block at work.
        dense_OI: the linears' dense weights.
        initial: the linears as the pruner left them.
        current: the linears as they are now.
        rebuilt: how many blocks are done: their outputs are in the stream, and those of the one at work with the
            initial masks.
        adds_outputs: the layer adds its blocks' outputs to the residual stream as they are.
    """

    index: int
    layer: Layer
    targets: Activations | None
    dense_OI: Mapping[str, Tensor]
    initial: dict[str, Pruned] = field(default_factory=dict)
    current: dict[str, Pruned] = field(default_factory=dict)
    rebuilt: int = 0
    adds_outputs: bool = False

    def weights(self, block: Block | Layer) -> dict[str, Tensor]:
        """What the linears of a block have now."""
        return {linear.name: self.current[linear.name].weight_OI for linear in block.linears}


@dataclass(frozen=True)
class Stage:
    """Linears of a block that are fed before any of them has answered.

    Args:
        inputs: the linears that share an input, for each input.
    """

    inputs: list[list[str]]

    @property
    def names(self) -> list[str]:
        """The linears."""
        return [name for names in self.inputs for name in names]


def require_all_fed(block: Block, fed: Sequence[str]) -> None:
    """Stop where nothing is known of a linear: another one's statistic would be no better than a guess.

    Raises:
        BarberError: naming the first linear that no sample has reached.
    """
    for linear in block.linears:
        if linear.name not in fed:
            raise BarberError(f"{linear.name} is fed nothing by the calibration samples, so nothing says what to prune")


def sample_losses(y: Tensor, target: Tensor, num_samples: int) -> Tensor:
    """Mean over tokens and channels of the squared difference: (B,). Tokens may be flattened into samples."""
    difference_BLD = by_sample(y, num_samples).float() - by_sample(target, num_samples).float()
    return difference_BLD.square().mean(dim=(1, 2))
