"""A layer in progress: what the parts of the walk hand to each other."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from barber.errors import BarberError
from barber.methods.block import Pruned
from barber.model.blocks import Block, Layer
from barber.model.driver import Turn
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

    @classmethod
    def begun(cls, turn: Turn, targets: Activations | None, wanted: Container[str]) -> "LayerWork":
        """A layer whose turn it is; linears that are not wanted are left as they are, without a mask."""
        left = {name: weight_OI for name, weight_OI in turn.dense_OI.items() if name not in wanted}
        dense = {name: Pruned(torch.zeros_like(one_OI, dtype=torch.bool), one_OI) for name, one_OI in left.items()}
        return cls(turn.index, turn.layer, targets, turn.dense_OI, dict(dense), dict(dense))

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

    def __bool__(self) -> bool:
        return bool(self.inputs)

    @property
    def names(self) -> list[str]:
        """The linears."""
        return [name for names in self.inputs for name in names]

    def among(self, wanted: Container[str]) -> "Stage":
        """The stage with some of its linears only."""
        inputs = ([name for name in names if name in wanted] for names in self.inputs)
        return Stage([names for names in inputs if names])


def require_all_fed(names: Sequence[str], fed: Sequence[str]) -> None:
    """Stop where nothing is known of a linear: another one's statistic would be no better than a guess.

    Raises:
        BarberError: naming the first linear that no sample has reached.
    """
    for name in names:
        if name not in fed:
            raise BarberError(f"{name} is fed nothing by the calibration samples, so nothing says what to prune")


def sample_losses(y: Tensor, target: Tensor, num_samples: int) -> Tensor:
    """Mean over tokens and channels of the squared difference: (B,). Tokens may be flattened into samples."""
    difference_BLD = by_sample(y, num_samples).float() - by_sample(target, num_samples).float()
    return difference_BLD.square().mean(dim=(1, 2))
