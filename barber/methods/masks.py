"""Choosing and exchanging pruned weights: pure functions on (groups, members) matrices of scores.

Nothing here knows what a group is (an output row, an input column, a linear, a block, a cell of N:M): the callers
arrange the scores, these functions compare the members of every group at once. Ties go to the lower index. Nothing is
sorted where a threshold does: the k-th score of every group, and whatever lies beyond it.
"""

import torch

from barber.runtime.tensors import Tensor


def lowest(score_GM: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` lowest scores of every group as pruned (Wanda's rule, and that of N:M cells)."""
    if count == 0:
        return torch.zeros_like(score_GM, dtype=torch.bool)
    count_G = torch.full((len(score_GM),), count, device=score_GM.device)
    return _up_to(score_GM, score_GM.kthvalue(count, dim=1, keepdim=True).values, count_G)


def lowest_evenly(score_GM: Tensor, total: int) -> Tensor:
    """Mark exactly `total` scores as pruned: the lowest of every group, an equal number of each.

    What is left over goes to the groups whose next score is lowest, one each.
    """
    count, rest = divmod(total, len(score_GM))
    if rest == 0:
        return lowest(score_GM, count)
    next_1G = score_GM.kthvalue(count + 1, dim=1).values[None]
    return _lowest(score_GM, count + lowest(next_1G, rest)[0].long())


def order_evenly(score_GM: Tensor) -> Tensor:
    """When each score is marked as the `total` of `lowest_evenly` grows: it is, where this is below `total`.

    All the thresholds at once, so this one does sort. Returns the numbers from 0 to G * M - 1, int64: (G, M).
    """
    sorted_GM, member_GM = score_GM.sort(dim=1, stable=True)
    place_GM = torch.empty_like(member_GM)  # among the scores that are as many-th in their groups
    places_G = torch.arange(len(score_GM), device=score_GM.device)
    place_GM.scatter_(0, sorted_GM.argsort(dim=0, stable=True), places_G[:, None].expand_as(member_GM))
    rank_M = torch.arange(score_GM.shape[1], device=score_GM.device)
    return torch.empty_like(member_GM).scatter_(1, member_GM, rank_M * len(score_GM) + place_GM)


def exchange(score_GM: Tensor, pruned_GM: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Exchange pruned weights of high score for kept weights of low score, inside every group.

    With P the scores of a group's pruned weights, descending, and K those of its kept ones, ascending, c is the
    number of t with P[t] > K[t]: the pairs worth exchanging. The int(c * alpha) highest of P come back, as many of
    the lowest of K go: sparsity is unchanged by construction (LLM-Barber, arXiv 2408.10631, section 3.2).

    Returns the new mask (G, M) and the number of exchanged pairs of every group (G,), int64.
    """
    count_G = _budget(_pairs_worth_exchanging(score_GM, pruned_GM, ~pruned_GM), alpha)
    grown_GM = _highest(score_GM.masked_fill(~pruned_GM, -torch.inf), count_G)
    dropped_GM = _lowest(score_GM.masked_fill(pruned_GM, torch.inf), count_G)
    return pruned_GM & ~grown_GM | dropped_GM, count_G


def exchange_cells_by_row(score_OI: Tensor, pruned_OI: Tensor, alpha: float, m: int) -> tuple[Tensor, Tensor]:
    """The paper's N:M exchange: what grows is decided over the whole row, what goes inside each cell of `m`.

    Counts and growth are those of `exchange` over the output row. A cell in which g weights grew then drops the g
    lowest of its previously kept ones. The pairing is by row, so a cell may give up a weight for a worse one. Where
    a pattern keeps fewer than half, only as many of a cell's pruned weights may grow as it has kept ones to drop.

    Returns the new mask (O, I) and the number of exchanges of every row (O,), int64.
    """
    score_CM, pruned_CM = score_OI.reshape(-1, m), pruned_OI.reshape(-1, m)
    eligible_OI = _highest(score_CM.masked_fill(~pruned_CM, -torch.inf), (~pruned_CM).sum(dim=1)).view_as(pruned_OI)
    eligible_OI &= pruned_OI
    count_O = _budget(_pairs_worth_exchanging(score_OI, eligible_OI, ~pruned_OI), alpha)
    grown_OI = _highest(score_OI.masked_fill(~eligible_OI, -torch.inf), count_O)
    dropped_CM = _lowest(score_CM.masked_fill(pruned_CM, torch.inf), grown_OI.reshape(-1, m).sum(dim=1))
    return pruned_OI & ~grown_OI | dropped_CM.view_as(pruned_OI), count_O


def exchange_inside_cells(score_OI: Tensor, pruned_OI: Tensor, alpha: float, m: int) -> tuple[Tensor, Tensor]:
    """An N:M exchange that never loses score: pairs inside the cell of `m`, only where the gain is positive.

    In every cell the highest pruned weight is paired with the lowest kept one, the second with the second, and so on.
    With c the number of pairs of positive gain (score grown - score dropped) in an output row, the int(c * alpha)
    of the largest gain are exchanged.

    Returns the new mask (O, I) and the number of exchanges of every row (O,), int64.
    """
    score_CM, pruned_CM = score_OI.reshape(-1, m), pruned_OI.reshape(-1, m)
    growth_CM, growth_order_CM = score_CM.masked_fill(~pruned_CM, -torch.inf).sort(dim=1, descending=True, stable=True)
    loss_CM, loss_order_CM = score_CM.masked_fill(pruned_CM, torch.inf).sort(dim=1, stable=True)
    gain_OI = (growth_CM - loss_CM).view_as(score_OI)
    count_O = _budget((gain_OI > 0).sum(dim=1), alpha)
    chosen_CM = _highest(gain_OI, count_O).reshape(-1, m)
    grown_CM = torch.zeros_like(pruned_CM).scatter_(1, growth_order_CM, chosen_CM)
    dropped_CM = torch.zeros_like(pruned_CM).scatter_(1, loss_order_CM, chosen_CM)
    return (pruned_CM & ~grown_CM | dropped_CM).view_as(pruned_OI), count_O


def _pairs_worth_exchanging(score_GM: Tensor, pruned_GM: Tensor, kept_GM: Tensor) -> Tensor:
    """How many t have P[t] > K[t], with P the pruned scores, descending, and K the kept ones, ascending: (G,).

    Exchanging all of them would leave the |K| highest of both kept. So with the |K|-th highest as a threshold they are
    the pruned ones above it, or the kept ones below it: whichever are more, for those that equal it pair with the rest.
    """
    candidate_GM = score_GM.masked_fill(~(pruned_GM | kept_GM), -torch.inf)
    threshold_G1 = -_kth_lowest(-candidate_GM, kept_GM.sum(dim=1))
    above_G = (pruned_GM & (score_GM > threshold_G1)).sum(dim=1)
    below_G = (kept_GM & (score_GM < threshold_G1)).sum(dim=1)
    return torch.maximum(above_G, below_G)


def _budget(count_G: Tensor, alpha: float) -> Tensor:
    """int(count * alpha) of every group, in float64 as Python computes it."""
    return (count_G.double() * alpha).long()


def _highest(score_GM: Tensor, count_G: Tensor) -> Tensor:
    """Mark the `count` highest scores of every group."""
    return _lowest(-score_GM, count_G)


def _lowest(score_GM: Tensor, count_G: Tensor) -> Tensor:
    """Mark the `count` lowest scores of every group."""
    return _up_to(score_GM, _kth_lowest(score_GM, count_G), count_G)


def _up_to(score_GM: Tensor, threshold_G1: Tensor, count_G: Tensor) -> Tensor:
    """Mark the `count` lowest scores of every group, of which the threshold is the highest."""
    marked_GM = score_GM <= threshold_G1
    surplus_G = marked_GM.sum(dim=1, dtype=torch.int32) - count_G
    if _at_hand(score_GM) and not (surplus_G > 0).any():
        return marked_GM
    tied_GM = score_GM == threshold_G1
    rank_GM = tied_GM.cumsum(dim=1, dtype=torch.int32)  # from 1
    return marked_GM & ~(tied_GM & (rank_GM > rank_GM[:, -1:] - surplus_G[:, None]))


def _kth_lowest(score_GM: Tensor, k_G: Tensor) -> Tensor:
    """The k-th lowest score of every group, k from 1; minus infinity for k = 0: (G, 1)."""
    if _at_hand(score_GM):
        most = max(1, int(k_G.max()))
        ordered_GM = score_GM.topk(most, dim=1, largest=False).values
    else:
        ordered_GM = score_GM.sort(dim=1).values
    kth_G1 = ordered_GM.gather(1, (k_G - 1).clamp(min=0)[:, None])
    return kth_G1.masked_fill(k_G[:, None] == 0, -torch.inf)


def _at_hand(tensor: Tensor) -> bool:
    """Whether its values may be looked at: a device would have to be waited for."""
    return tensor.device.type == "cpu"
