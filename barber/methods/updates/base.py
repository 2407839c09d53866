"""What the updates have in common."""

import torch

from barber.methods.block import Pruned
from barber.methods.rebuild.base import Rebuilt
from barber.runtime.tensors import Tensor


def damped(gram_II: Tensor, damping: float) -> Tensor:
    """The matrix with a share of its diagonal's mean added to the diagonal; a new one."""
    gram_II = gram_II.clone()
    diagonal_I = gram_II.diagonal()
    diagonal_I.add_(damping * diagonal_I.mean())
    return gram_II


def normalised(gram_II: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix for inputs of norm 1, and the norms (I,); inputs that are always zero stay zero, with norm 1."""
    norm_I = gram_II.diagonal().sqrt()
    norm_I = torch.where(norm_I > 0, norm_I, 1)
    return gram_II / norm_I / norm_I[:, None], norm_I


def held(mask_OI: Tensor, weight_OI: Tensor) -> Rebuilt:
    """A linear whose mask is the one that it had."""
    none = torch.zeros((), dtype=torch.int64, device=weight_OI.device)
    return Rebuilt(Pruned(mask_OI, weight_OI), none, weight_OI)
