"""Choosing and exchanging pruned weights: pure functions on (groups, members) matrices of scores.

Nothing here knows what a group is (an output row, an input column, a linear, a block, a cell of N:M): the callers
arrange the scores, these functions compare the members of every group at once. Ties go to the lower index.
"""

import torch

from barber.tensors import Tensor


def lowest(score_GM: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` lowest scores of every group as pruned (Wanda's rule, and that of N:M cells)."""
    order_GM = score_GM.argsort(dim=1, stable=True)
    return torch.zeros_like(score_GM, dtype=torch.bool).scatter_(1, order_GM[:, :count], True)


def at_most_the(index: int, score_GM: Tensor) -> Tensor:
    """Mark every score up to and including the one at 0-based `index` of its group's ascending order.

    That is one more than `index`, and more where scores tie: the threshold rule of magnitude pruning and of
    SparseGPT's blocks of columns.
    """
    threshold_G1 = score_GM.kthvalue(index + 1, dim=1, keepdim=True).values
    return score_GM <= threshold_G1


def exchange(score_GM: Tensor, pruned_GM: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Exchange pruned weights of high score for kept weights of low score, inside every group.

    With P the scores of a group's pruned weights, descending, and K those of its kept ones, ascending, c is the
    number of t with P[t] > K[t]: the pairs worth exchanging. The int(c * alpha) highest of P come back, as many of
    the lowest of K go: sparsity is unchanged by construction (LLM-Barber, arXiv 2408.10631, section 3.2).

    Returns the new mask (G, M) and the number of exchanged pairs of every group (G,), int64.
    """
    growth_GM, growth_order_GM = _descending(score_GM, pruned_GM)
    loss_GM, loss_order_GM = _ascending(score_GM, ~pruned_GM)
    count_G = _budget((growth_GM > loss_GM).sum(dim=1), alpha)
    chosen_GM = _first(count_G, score_GM)
    grown_GM = torch.zeros_like(pruned_GM).scatter_(1, growth_order_GM, chosen_GM)
    dropped_GM = torch.zeros_like(pruned_GM).scatter_(1, loss_order_GM, chosen_GM)
    return pruned_GM & ~grown_GM | dropped_GM, count_G


def exchange_cells_by_row(score_OI: Tensor, pruned_OI: Tensor, alpha: float, m: int) -> tuple[Tensor, Tensor]:
    """The paper's N:M exchange: what grows is decided over the whole row, what goes inside each cell of `m`.

    Counts and growth are those of `exchange` over the output row. A cell in which g weights grew then drops the g
    lowest of its previously kept ones. The pairing is by row, so a cell may give up a weight for a worse one. Where
    a pattern keeps fewer than half, only as many of a cell's pruned weights may grow as it has kept ones to drop.

    Returns the new mask (O, I) and the number of exchanges of every row (O,), int64.
    """
    cells = (-1, m)
    eligible_OI = pruned_OI & _best_of_cell(score_OI.reshape(cells), pruned_OI.reshape(cells)).view_as(pruned_OI)
    growth_OI, growth_order_OI = _descending(score_OI, eligible_OI)
    loss_OI, _ = _ascending(score_OI, ~pruned_OI)
    count_O = _budget((growth_OI > loss_OI).sum(dim=1), alpha)
    grown_OI = torch.zeros_like(pruned_OI).scatter_(1, growth_order_OI, _first(count_O, score_OI))

    kept_CM = ~pruned_OI.reshape(cells)
    _, loss_order_CM = _ascending(score_OI.reshape(cells), kept_CM)
    grown_in_cell_C = grown_OI.reshape(cells).sum(dim=1)
    dropped_CM = torch.zeros_like(kept_CM).scatter_(1, loss_order_CM, _first(grown_in_cell_C, kept_CM))
    return pruned_OI & ~grown_OI | dropped_CM.view_as(pruned_OI), count_O


def exchange_inside_cells(score_OI: Tensor, pruned_OI: Tensor, alpha: float, m: int) -> tuple[Tensor, Tensor]:
    """An N:M exchange that never loses score: pairs inside the cell of `m`, only where the gain is positive.

    In every cell the highest pruned weight is paired with the lowest kept one, the second with the second, and so on.
    With c the number of pairs of positive gain (score grown - score dropped) in an output row, the int(c * alpha)
    of the largest gain are exchanged.

    Returns the new mask (O, I) and the number of exchanges of every row (O,), int64.
    """
    score_CM, pruned_CM = score_OI.reshape(-1, m), pruned_OI.reshape(-1, m)
    growth_CM, growth_order_CM = _descending(score_CM, pruned_CM)
    loss_CM, loss_order_CM = _ascending(score_CM, ~pruned_CM)
    gain_OI = (growth_CM - loss_CM).view_as(score_OI)
    count_O = _budget((gain_OI > 0).sum(dim=1), alpha)
    gain_order_OI = gain_OI.argsort(dim=1, descending=True, stable=True)
    chosen_OI = torch.zeros_like(pruned_OI).scatter_(1, gain_order_OI, _first(count_O, score_OI))
    chosen_CM = chosen_OI.reshape(-1, m)
    grown_CM = torch.zeros_like(pruned_CM).scatter_(1, growth_order_CM, chosen_CM)
    dropped_CM = torch.zeros_like(pruned_CM).scatter_(1, loss_order_CM, chosen_CM)
    return (pruned_CM & ~grown_CM | dropped_CM).view_as(pruned_OI), count_O


def _descending(score_GM: Tensor, candidate_GM: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and indices of the candidates from the highest down; the others stand last, at minus infinity."""
    return score_GM.masked_fill(~candidate_GM, -torch.inf).sort(dim=1, descending=True, stable=True)


def _ascending(score_GM: Tensor, candidate_GM: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and indices of the candidates from the lowest up; the others stand last, at infinity."""
    return score_GM.masked_fill(~candidate_GM, torch.inf).sort(dim=1, stable=True)


def _budget(count_G: Tensor, alpha: float) -> Tensor:
    """int(count * alpha) of every group, in float64 as Python computes it."""
    return (count_G.double() * alpha).long()


def _first(count_G: Tensor, like_GM: Tensor) -> Tensor:
    """True in the first `count` places of every group."""
    return torch.arange(like_GM.shape[1], device=like_GM.device) < count_G[:, None]


def _best_of_cell(score_CM: Tensor, pruned_CM: Tensor) -> Tensor:
    """The highest-scored pruned weights of every cell, as many as the cell has kept ones."""
    _, order_CM = _descending(score_CM, pruned_CM)
    kept_C = (~pruned_CM).sum(dim=1)
    return torch.zeros_like(pruned_CM).scatter_(1, order_CM, _first(kept_C, pruned_CM))
