"""ADMM: the kept weights by alternating directions, with one inverse for all rows.

Boza, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938, algorithm 1; the
normalisation and the ridge are those of the authors' code. All in float32.
"""

from dataclasses import dataclass

import torch

from barber.errors import NumericsError, require_counts, require_not_negative, require_positive
from barber.methods.block import BlockState, named
from barber.methods.patterns import Pattern
from barber.methods.rebuild.base import Needs, Rebuilt
from barber.methods.statistics import Hessian
from barber.methods.updates.base import damped, held, normalised
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class ADMM:
    """Alternate between weights that fit the outputs and weights that obey the mask.

    It begins with the dense weights, whatever the step before made of them. Inputs are normalised first, so that
    `rho` and `damping` mean the same in every linear.

    Args:
        iterations: 20 in the paper.
        rho: how strongly the two are drawn to each other; with inputs of norm 1.
        damping: the ridge, as a share of the mean diagonal of the normalised inputs' Hessian.
    """

    iterations: int = 20
    rho: float = 1.0
    damping: float = 0.1

    def __post_init__(self) -> None:
        require_counts(self, "iterations")
        require_positive(self, "rho")
        require_not_negative(self, "damping")

    @property
    def needs(self) -> Needs:
        """The inputs' second moment."""
        return Needs(Hessian)

    def check(self, pattern: Pattern) -> None:
        """Every pattern is allowed."""

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        """New weights, each linear by itself.

        Raises:
            NumericsError: H + rho of the normalised inputs cannot be inverted.
        """
        rebuilt = {}
        for hessian_II, names in block.by_input():
            gram_II, norm_I = normalised(hessian_II)
            gram_II = damped(gram_II, self.damping)
            with named(names[0]):
                inverse_II = self._inverse(gram_II)
            for name in names:
                mask_OI = block.pruned[name].mask_OI
                weight_OI = self._alternate(block.dense_OI[name] * norm_I, gram_II, inverse_II, mask_OI) / norm_I
                rebuilt[name] = held(mask_OI, weight_OI)
        return rebuilt

    def _inverse(self, gram_II: Tensor) -> Tensor:
        """(G + rho)^-1."""
        shifted_II = gram_II.clone()
        shifted_II.diagonal().add_(self.rho)
        factor_II, failed = torch.linalg.cholesky_ex(shifted_II)
        if failed:
            raise NumericsError(
                f"the Hessian of the inputs is not positive definite with update.admm.rho={self.rho}; use a larger one"
            )
        return torch.cholesky_inverse(factor_II)

    def _alternate(self, dense_OI: Tensor, gram_II: Tensor, inverse_II: Tensor, mask_OI: Tensor) -> Tensor:
        """The kept weights, given the dense ones and G, for normalised inputs."""
        target_OI, free_OI, dual_OI = dense_OI @ gram_II, dense_OI, torch.zeros_like(dense_OI)
        for _ in range(self.iterations):
            kept_OI = (free_OI + dual_OI).masked_fill(mask_OI, 0)
            dual_OI = dual_OI + free_OI - kept_OI
            free_OI = (target_OI + self.rho * (kept_OI - dual_OI)) @ inverse_II
        return (free_OI + dual_OI).masked_fill(mask_OI, 0)
