"""What a method for the initial mask is."""

from typing import ClassVar, Literal, Protocol

from barber.methods.block import BlockState, Pruned
from barber.methods.statistics import InputStatistic

GradientOf = Literal["layer", "loss"] | None


class Pruner(Protocol):
    """A method for the initial mask.

    `statistic` is what it needs of every linear's inputs; None: no data at all. `gradient` is of what it needs the
    gradients by the dense weights: the norm of the decoder `layer`'s output, the whole model's `loss`; None: nothing.
    `updates` says whether weights that it keeps get new values.
    """

    statistic: ClassVar[type[InputStatistic] | None]
    gradient: ClassVar[GradientOf]
    updates: ClassVar[bool]

    def prune(self, block: BlockState) -> dict[str, Pruned]:
        """Prune all linears of a block, by name.

        Raises:
            NumericsError: the statistic of a linear's inputs is of no use.
        """
        ...
