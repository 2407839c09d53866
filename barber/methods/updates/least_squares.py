"""Least squares: the kept weights of every output row that come closest to the dense outputs.

With S the kept weights of a row, H = 2 X X^T of the inputs and w its dense weights, the row solves

    (H + lambda)_SS w'_S = ((H + lambda) w)_S,    lambda = damping * mean diagonal of H.

Every row would need an inverse of its own. Conjugate gradients need none: all rows take their steps together, each
step one product with H. A few steps from a good start do (as in ALPS, arXiv 2406.07831, section 3.3).
"""

from dataclasses import dataclass

import torch

from barber.errors import require_counts, require_not_negative, require_share
from barber.methods.block import BlockState
from barber.methods.patterns import Pattern
from barber.methods.rebuild.base import Needs, Rebuilt
from barber.methods.statistics import Hessian
from barber.methods.updates.base import damped, held
from barber.runtime.tensors import Tensor

# Of the size of a row's right side, resp. of a direction: what float32 cannot tell from nothing.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class LeastSquares:
    """Minimise ||W' X - T||^2 + lambda ||W' - W||^2 over the kept weights, from the weights as they are so far.

    Args:
        steps: of the conjugate gradients; each lowers what is minimised.
        damping: lambda, as a share of the mean diagonal of the inputs' Hessian; a few large inputs make it heavy for
            all others.
        follow: what the outputs T are made of: from 0, the inputs as they are in the pruned model, to 1, those that
            the dense model feeds the linear. Above 0 a linear makes up for what was lost before it.
    """

    steps: int = 10
    damping: float = 0.01
    follow: float = 0.0

    def __post_init__(self) -> None:
        require_counts(self, "steps")
        require_not_negative(self, "damping")
        require_share(self, "follow")

    @property
    def needs(self) -> Needs:
        """The inputs' second moment; to follow, the dense model's inputs."""
        return Needs(Hessian, dense=self.follow > 0)

    def check(self, pattern: Pattern) -> None:
        """Every pattern is allowed."""

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        """New weights, each linear by itself."""
        rebuilt = {}
        for hessian_II, names in block.by_input():
            gram_II = damped(hessian_II, self.damping)
            for name in names:
                mask_OI, target_OI = block.pruned[name].mask_OI, block.dense_OI[name] @ gram_II
                if self.follow:
                    target_OI += block.made_up_for(name, self.follow)
                weight_OI = solve_kept(block.pruned[name].weight_OI, target_OI, gram_II, mask_OI, self.steps)
                rebuilt[name] = held(mask_OI, weight_OI)
        return rebuilt


def solve_kept(weight_OI: Tensor, target_OI: Tensor, gram_II: Tensor, mask_OI: Tensor, steps: int) -> Tensor:
    """Solve w G = t for the kept weights of every row, by conjugate gradients with the diagonal as preconditioner.

    Args:
        weight_OI: where to begin, float32, zero where pruned.
        target_OI: t; only what stands at kept weights matters.
        gram_II: G, positive semidefinite.
        mask_OI: True where a weight has to stay zero.
        steps: at most so many; on a CPU it ends before where all rows are solved.

    Returns the new weight (O, I).
    """
    diagonal_I = gram_II.diagonal()
    inverse_I = 1 / diagonal_I.clamp(min=torch.finfo(diagonal_I.dtype).tiny)
    weight_OI = weight_OI.clone()
    residual_OI = (target_OI - weight_OI @ gram_II).masked_fill_(mask_OI, 0)
    square_O1 = _square(residual_OI, inverse_I)
    direction_OI = residual_OI * inverse_I
    # A row that is solved stands still. Going on would divide noise by noise, and on a CPU denormal numbers crawl.
    solved_O1 = _TOLERANCE**2 * _square(target_OI, inverse_I)
    moves_O1 = square_O1 > solved_O1
    direction_OI = torch.where(moves_O1, direction_OI, 0)
    for _ in range(steps):
        if weight_OI.device.type == "cpu" and not moves_O1.any():  # a GPU is not asked
            break
        pushed_OI = direction_OI @ gram_II
        curvature_O1 = (direction_OI * pushed_OI).sum(dim=1, keepdim=True)
        # Where G is singular a direction may do nothing: no step along it is the right one.
        moves_O1 &= curvature_O1 > _TOLERANCE * _square(direction_OI, diagonal_I)
        step_O1 = torch.where(moves_O1, square_O1 / curvature_O1, 0)
        weight_OI.addcmul_(step_O1, direction_OI)
        residual_OI.addcmul_(step_O1, pushed_OI, value=-1).masked_fill_(mask_OI, 0)
        before_O1, square_O1 = square_O1, _square(residual_OI, inverse_I)
        moves_O1 &= square_O1 > solved_O1
        direction_OI = torch.where(moves_O1, residual_OI * inverse_I + (square_O1 / before_O1) * direction_OI, 0)
    return weight_OI


def _square(x_OI: Tensor, scale_I: Tensor) -> Tensor:
    """The weighted sum of squares of every row: (O, 1)."""
    return (x_OI.square() @ scale_I)[:, None]
