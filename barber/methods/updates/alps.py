"""ALPS: choose the mask anew together with the weights, by ADMM with a growing penalty, then solve for the weights.

Meng et al., arXiv 2406.07831, algorithm 1 and section 3.3; the rule for the penalty is that of the authors' code.
"""

from dataclasses import dataclass

import torch

from barber.errors import NumericsError, require_counts, require_not_negative, require_positive, require_share
from barber.methods import masks
from barber.methods.block import BlockState, Pruned, named
from barber.methods.patterns import NM, Pattern
from barber.methods.rebuild.base import Needs, Rebuilt
from barber.methods.statistics import Hessian
from barber.methods.updates.base import damped, normalised
from barber.methods.updates.least_squares import solve_kept
from barber.runtime.tensors import Tensor

# Iterations between two looks at how much the mask still changes.
_EVERY = 3
# The factors that rho grows by where more than that share of the kept weights has changed.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# Of the first changes: a mask that changes no more than that is held where it is by a rho that is too large.
_ALIVE = 0.005
# From this iteration on, a mask that changes less than that is taken as it is.
_PATIENCE, _SETTLED = 30, 0.0003
# Outside of it float32 sees either the penalty alone or none.
_LEAST_RHO, _MOST_RHO = 1e-5, 1e6


@dataclass(frozen=True)
class ALPS:
    """Search for a mask with as many weights as the one at hand, and solve for its kept weights.

    The paper's method takes of the mask that it is given no more than the number of weights that are pruned: of a row,
    or with N:M of a cell (the paper: of the whole matrix). With `choose: false` the mask is held, and what is left of
    the method are the final conjugate gradients, from the dense weights with the mask applied.

    Args:
        choose: choose the mask anew.
        iterations: of the search, at most so many; it ends before where the mask has settled.
        rho: the penalty that it begins with, for inputs of norm 1.
        damping: added to the Hessian's diagonal, as a share of the diagonal's mean; before the inputs are normalised,
            so that a few large inputs make it heavy for all others.
        steps: conjugate gradients on the chosen mask.
        follow: the share of the drift from the dense model that mask and weights make up for, from 0 to 1; not in
            the paper.
    """

    choose: bool = True
    iterations: int = 300
    rho: float = 0.1
    damping: float = 0.01
    steps: int = 10
    follow: float = 0.0

    def __post_init__(self) -> None:
        require_counts(self, "iterations", "steps")
        require_positive(self, "rho")
        require_not_negative(self, "damping")
        require_share(self, "follow")

    @property
    def needs(self) -> Needs:
        """The inputs' second moment; to follow, the dense model's inputs."""
        return Needs(Hessian, dense=self.follow > 0)

    def check(self, pattern: Pattern) -> None:
        """Every pattern is allowed."""

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        """New masks and weights, each linear by itself.

        Raises:
            NumericsError: the Hessian is NaN or infinite.
        """
        rebuilt = {}
        for hessian_II, names in block.by_input():
            gram_II = damped(hessian_II, self.damping)
            with named(names[0]):
                search = _Search.of(gram_II) if self.choose else None
            for name in names:
                before_OI = block.pruned[name].mask_OI
                target_OI = block.dense_OI[name] @ gram_II
                if self.follow:
                    target_OI += block.made_up_for(name, self.follow)
                start = Pruned.masking(block.dense_OI[name], before_OI)
                if search is not None:
                    start = search.run(
                        block.dense_OI[name], target_OI, before_OI, block.patterns[name], self.rho, self.iterations
                    )
                weight_OI = solve_kept(start.weight_OI, target_OI, gram_II, start.mask_OI, self.steps)
                num_exchanged = (before_OI & ~start.mask_OI).sum()
                rebuilt[name] = Rebuilt(Pruned(start.mask_OI, weight_OI), num_exchanged, weight_OI)
        return rebuilt


@dataclass(frozen=True)
class _Search:
    """ADMM over masks and weights of linears that share their inputs, for inputs of norm 1.

    Args:
        gram_II: G of the normalised inputs, damped.
        norm_I: what the inputs were divided by.
        eigenvalues_I, eigenvectors_II: of G, float64 as in the authors' code: small ones are divided by.
    """

    gram_II: Tensor
    norm_I: Tensor
    eigenvalues_I: Tensor
    eigenvectors_II: Tensor

    @classmethod
    def of(cls, gram_II: Tensor) -> "_Search":
        gram_II, norm_I = normalised(gram_II)
        try:
            eigenvalues_I, eigenvectors_II = torch.linalg.eigh(gram_II.double())
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NumericsError("the Hessian of the inputs has no eigenvalues: it is NaN or infinite") from error
        return cls(gram_II, norm_I, eigenvalues_I.clamp(min=0), eigenvectors_II)

    def run(
        self, dense_OI: Tensor, target_OI: Tensor, mask_OI: Tensor, pattern: Pattern, rho: float, iterations: int
    ) -> Pruned:
        """A mask with as many pruned weights in every row or cell as the one given, and weights to go on with.

        The target is the product of the outputs that are aimed at with the inputs as they are.
        """
        dense_OI, target_OI = dense_OI * self.norm_I, target_OI / self.norm_I
        first = Pruned.masking(dense_OI, _project(dense_OI, mask_OI, pattern))
        kept, seen_OI = first, first.mask_OI
        dual_OI = torch.zeros_like(dense_OI)
        inverse_II = self._inverse(rho)
        num_kept, moved = int((~mask_OI).sum()), False
        for iteration in range(1, iterations + 1):
            free_OI = (target_OI - dual_OI + rho * kept.weight_OI) @ inverse_II
            aim_OI = free_OI + dual_OI / rho
            kept = Pruned.masking(aim_OI, _project(aim_OI, kept.mask_OI, pattern))
            dual_OI = dual_OI + rho * (free_OI - kept.weight_OI)
            if iteration % _EVERY:
                continue
            # Going on when the mask has settled would cost more than asking the device.
            changed = int((kept.mask_OI != seen_OI).sum()) / max(1, num_kept)
            seen_OI = kept.mask_OI
            if (moved and changed == 0) or (iteration > _PATIENCE and changed < _SETTLED):
                break
            moved = moved or changed > _ALIVE
            if moved:
                rho = min(rho * next(factor for share, factor in _GROWTH if changed > share), _MOST_RHO)
            elif rho < _LEAST_RHO:
                break
            else:
                rho /= 5
                kept, seen_OI = first, first.mask_OI
                dual_OI = torch.zeros_like(dense_OI)
            inverse_II = self._inverse(rho)
        return Pruned(kept.mask_OI, kept.weight_OI / self.norm_I)

    def _inverse(self, rho: float) -> Tensor:
        """(G + rho)^-1, float32."""
        scaled_II = self.eigenvectors_II / (self.eigenvalues_I + rho)
        return (scaled_II @ self.eigenvectors_II.T).to(self.gram_II.dtype)


def _project(weight_OI: Tensor, mask_OI: Tensor, pattern: Pattern) -> Tensor:
    """The mask of the largest weights, with as many pruned in every row, or with N:M in every cell, as in another one.

    An exchange of all pairs that are worth it leaves exactly these.
    """
    size_GM, mask_GM = weight_OI.abs(), mask_OI
    if isinstance(pattern, NM):
        size_GM, mask_GM = size_GM.reshape(-1, pattern.m), mask_GM.reshape(-1, pattern.m)
    return masks.exchange(size_GM, mask_GM, 1.0)[0].view_as(mask_OI)
