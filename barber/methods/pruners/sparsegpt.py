"""SparseGPT: prune column by column, spreading each column's error over those to its right.

Frantar and Alistarh, arXiv 2301.00774, algorithm 1. All in float32.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from barber.errors import NumericsError, require_counts, require_not_negative
from barber.methods.block import BlockState, Pruned, named
from barber.methods.masks import lowest
from barber.methods.patterns import NM, Pattern
from barber.methods.pruners.base import GradientOf
from barber.methods.statistics import Hessian, InputStatistic
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class SparseGPT:
    """Optimal-brain-surgeon pruning with lazy updates of the kept weights; the weights change.

    Args:
        damping: added to the Hessian's diagonal, as a share of the diagonal's mean.
        block_size: columns that are pruned together before their error is spread over the rest.
    """

    damping: float = 0.01
    block_size: int = 128

    statistic: ClassVar[type[InputStatistic] | None] = Hessian
    gradient: ClassVar[GradientOf] = None
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_not_negative(self, "damping")
        require_counts(self, "block_size")

    def prune(self, block: BlockState) -> dict[str, Pruned]:
        """Column by column; linears that share their inputs share the factor of their Hessian.

        Raises:
            NumericsError: a Hessian cannot be inverted.
        """
        pruned = {}
        for hessian_II, names in block.by_input():
            with named(names[0]):
                prepared = factor_inverse(hessian_II.clone(), self.damping, "pruner.damping")
            for name in names:
                pruned[name] = prune_by_columns(block.dense_OI[name], prepared, block.patterns[name], self.block_size)
        return pruned


def factor_inverse(hessian_II: Tensor, damping: float, key: str) -> tuple[Tensor, Tensor]:
    """The inputs that are always zero (I,), and the upper Cholesky factor of the inverse damped Hessian (I, I).

    The Hessian is changed in place. `key` is the full one of the damping, for the message.

    Raises:
        NumericsError: the Hessian cannot be inverted.
    """
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1
    diagonal_I.add_(damping * diagonal_I.mean())
    factor_II, failed = torch.linalg.cholesky_ex(hessian_II)
    if not failed:
        factor_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor_II), upper=True)
    if failed:
        raise NumericsError(
            f"the Hessian of the inputs is not positive definite with {key}={damping}; "
            f"use more calibration tokens or a larger {key}"
        )
    return dead_I, factor_II


def prune_by_columns(
    weight_OI: Tensor, prepared: tuple[Tensor, Tensor], choice: Pattern | Tensor, block_size: int
) -> Pruned:
    """Prune a linear column by column, given its dense weight and what `factor_inverse` made of its inputs' Hessian.

    `choice` is the pattern that the mask is chosen by on the way, or the mask itself (O, I).
    """
    dead_I, inverse_II = prepared
    weight_OI = weight_OI.masked_fill(dead_I, 0)
    mask_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    width = weight_OI.shape[1]
    for start in range(0, width, block_size):
        columns = slice(start, min(start + block_size, width))
        weight_OI[:, columns], mask_OI[:, columns], error_OM = _prune_columns(
            weight_OI[:, columns],
            inverse_II[columns, columns],
            choice[:, columns] if isinstance(choice, Tensor) else choice.of_columns(start, columns.stop, width),
            start,
        )
        weight_OI[:, columns.stop :] -= error_OM @ inverse_II[columns, columns.stop :]
    return Pruned(mask_OI, weight_OI)


def _prune_columns(
    weight_OM: Tensor, inverse_MM: Tensor, choice: Pattern | Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune a block of columns, the first of which is column `start` of the linear.

    Returns the weight and the mask of the block and the errors to be spread over the columns right of it; (O, M) each.
    """
    weight_OM = weight_OM.clone()
    error_OM = torch.zeros_like(weight_OM)
    diagonal_M = inverse_MM.diagonal()
    if isinstance(choice, Tensor):
        mask_OM = choice
    elif isinstance(choice, NM):
        mask_OM = torch.zeros_like(weight_OM, dtype=torch.bool)
    else:
        mask_OM = choice.prune_whole(weight_OM.square() / diagonal_M.square())

    for j in range(weight_OM.shape[1]):
        if isinstance(choice, NM) and (start + j) % choice.m == 0:
            cell = slice(j, j + choice.m)
            score_OM = weight_OM[:, cell].square() / diagonal_M[cell].square()
            mask_OM[:, cell] = lowest(score_OM, choice.m - choice.n)
        column_O = weight_OM[:, j]
        error_O = torch.where(mask_OM[:, j], column_O, 0) / diagonal_M[j]
        weight_OM[:, j] = column_O.masked_fill(mask_OM[:, j], 0)
        weight_OM[:, j + 1 :] -= error_O[:, None] * inverse_MM[j, j + 1 :]
        error_OM[:, j] = error_O
    return weight_OM, mask_OM, error_OM
