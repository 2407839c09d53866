"""SparseGPT's update of the kept weights, for a mask that some other method has chosen.

Frantar and Alistarh, arXiv 2301.00774, algorithm 1, less its choice of the mask. All in float32.
"""

from dataclasses import dataclass

from barber.errors import require_counts, require_not_negative
from barber.methods.block import BlockState, named
from barber.methods.patterns import Pattern
from barber.methods.pruners.sparsegpt import factor_inverse, prune_by_columns
from barber.methods.rebuild.base import Needs, Rebuilt
from barber.methods.statistics import Hessian
from barber.methods.updates.base import held


@dataclass(frozen=True)
class SparseGPTUpdate:
    """Prune the dense weights column by column, spreading each column's error over the weights to its right.

    It begins with the dense weights, whatever the step before made of them. As in the pruner, weights of inputs that
    are always zero become zero.

    Args:
        damping: added to the Hessian's diagonal, as a share of the diagonal's mean.
        block_size: columns that are pruned together before their error is spread over the rest; it changes no more
            than the last bits.
    """

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        require_not_negative(self, "damping")
        require_counts(self, "block_size")

    @property
    def needs(self) -> Needs:
        """The inputs' second moment."""
        return Needs(Hessian)

    def check(self, pattern: Pattern) -> None:
        """Every pattern is allowed."""

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        """New weights, each linear by itself.

        Raises:
            NumericsError: a Hessian cannot be inverted.
        """
        rebuilt = {}
        for hessian_II, names in block.by_input():
            with named(names[0]):
                prepared = factor_inverse(hessian_II.clone(), self.damping, "update.sparsegpt.damping")
            for name in names:
                mask_OI = block.pruned[name].mask_OI
                updated = prune_by_columns(block.dense_OI[name], prepared, mask_OI, self.block_size)
                rebuilt[name] = held(mask_OI, updated.weight_OI)
        return rebuilt
