"""Exact pair exchange: every exchange lowers the error of its linear's output, and the best one goes first.

After SparseSwaps (arXiv 2512.10922), by the algebra of the quadratic: with r the lost weights of an output row (w where
pruned, else 0) and G = X X^T of the inputs, the row's output error is r^T G r, and with c = G r

    growing p and pruning q changes it by  w_p^2 G_pp - 2 w_p c_p  +  w_q^2 G_qq + 2 w_q c_q  -  2 w_p w_q G_pq.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from barber.errors import UserError
from barber.patterns import NM, Pattern
from barber.pruners import Pruned
from barber.rebuild.base import Evidence, Rebuilt
from barber.statistics import Hessian, InputStatistic
from barber.tensors import Tensor

# Of a row's error: what rounding alone could gain.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Swaps:
    """Exchange pairs of an output row, or of an N:M cell, as long as the error of the linear's output falls.

    The masks alone change. Rows are independent of each other, and all of them advance together: in a round every row
    looks at its most promising weights and exchanges the best pairs among them, each with its exact gain.

    Args:
        candidates: how many weights of each kind, or cells, a row looks at in a round, and the most that it exchanges.
        rounds: at most so many; it ends before where no pair gains.
    """

    candidates: int = 16
    rounds: int = 50

    statistic: ClassVar[type[InputStatistic] | None] = Hessian
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("candidates", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"must be at least 1, not {getattr(self, name)}", field=name)

    def check(self, pattern: Pattern) -> None:
        """Every pattern is allowed."""

    def weight(self, dense_OI: Tensor, pruned: Pruned) -> Tensor:
        """The dense weight: no weight is changed."""
        return dense_OI

    def rebuild(
        self, weight_OI: Mapping[str, Tensor], mask_OI: Mapping[str, Tensor], evidence: Evidence, pattern: Pattern
    ) -> dict[str, Rebuilt]:
        """New masks for a block's linears, each by itself."""
        cell = pattern.m if isinstance(pattern, NM) else None
        rebuilt = {}
        for name, pruned_OI in mask_OI.items():
            gram_II = evidence.inputs[name]
            found_OI, count_O = exchange_exactly(
                weight_OI[name], gram_II, pruned_OI, self.candidates, self.rounds, cell
            )
            rebuilt[name] = Rebuilt(found_OI, count_O.sum(), gram_II)
        return rebuilt


def exchange_exactly(
    weight_OI: Tensor, gram_II: Tensor, pruned_OI: Tensor, candidates: int, rounds: int, cell: int | None = None
) -> tuple[Tensor, Tensor]:
    """Exchange pruned and kept weights of every output row while the row's error r^T G r falls.

    Args:
        weight_OI, gram_II: float32; G may have any scale.
        pruned_OI: the mask to begin with.
        candidates, rounds: as in `Swaps`.
        cell: the m of an N:M pattern, where a pair has to lie inside a cell; None: anywhere in the row.

    Returns the new mask (O, I) and the number of exchanges of every row (O,), int64.
    """
    result_OI, count_O = pruned_OI.clone(), torch.zeros(len(weight_OI), dtype=torch.int64, device=weight_OI.device)
    rows_R = torch.arange(len(weight_OI), device=weight_OI.device)
    propose = _pairs_of_row if cell is None else _pairs_of_cells
    for _ in range(rounds):
        weight_RI, pruned_RI = weight_OI[rows_R], result_OI[rows_R]
        lost_RI = weight_RI.masked_fill(~pruned_RI, 0)
        pull_RI = lost_RI @ gram_II
        own_RI = weight_RI.square() * gram_II.diagonal()
        grow_RI = (own_RI - 2 * weight_RI * pull_RI).masked_fill(~pruned_RI, torch.inf)
        drop_RI = (own_RI + 2 * weight_RI * pull_RI).masked_fill(pruned_RI, torch.inf)
        enough_R = -_TOLERANCE * (lost_RI * pull_RI).sum(dim=1).clamp(min=0)
        places_RS, partners_KK = propose(grow_RI, drop_RI, weight_RI, gram_II, candidates, cell)
        changed_RS = _best_pairs(
            weight_RI.gather(1, places_RS),
            pull_RI.gather(1, places_RS),
            gram_II[places_RS[:, :, None], places_RS[:, None, :]],
            torch.isfinite(torch.cat([grow_RI, drop_RI], dim=1)).gather(1, _twice(places_RS, grow_RI.shape[1])),
            partners_KK,
            enough_R,
        )
        # Added up: a weight may be there twice, once as a candidate that it is not.
        flips_RI = torch.zeros_like(pruned_RI, dtype=torch.int8).scatter_add_(1, places_RS, changed_RS.to(torch.int8))
        result_OI[rows_R] = pruned_RI ^ (flips_RI > 0)
        exchanged_R = changed_RS.sum(dim=1) // 2
        count_O[rows_R] += exchanged_R
        if weight_OI.device.type == "cpu":  # a GPU is not asked
            rows_R = rows_R[exchanged_R > 0]
            if not len(rows_R):
                break
    return result_OI, count_O


def _twice(places_RS: Tensor, width: int) -> Tensor:
    """The first half of places as they are, those to be dropped counted behind a row of `width`."""
    half = places_RS.shape[1] // 2
    return torch.cat([places_RS[:, :half], places_RS[:, half:] + width], dim=1)


def _pairs_of_row(
    grow_RI: Tensor, drop_RI: Tensor, weight_RI: Tensor, gram_II: Tensor, candidates: int, cell: int | None
) -> tuple[Tensor, Tensor]:
    """The K pruned weights and the K kept ones that would each gain most alone: (R, 2K); any may pair with any."""
    count = min(candidates, grow_RI.shape[1])
    places = [cost_RI.topk(count, dim=1, largest=False).indices for cost_RI in (grow_RI, drop_RI)]
    return torch.cat(places, dim=1), torch.ones(count, count, dtype=torch.bool, device=grow_RI.device)


def _pairs_of_cells(
    grow_RI: Tensor, drop_RI: Tensor, weight_RI: Tensor, gram_II: Tensor, candidates: int, cell: int | None
) -> tuple[Tensor, Tensor]:
    """The best pairs of the K cells that would gain most: (R, 2K), the pruned ones first; each with its own partner."""
    assert cell is not None
    num_rows, width = grow_RI.shape
    cells = width // cell
    weight_RCM = weight_RI.view(num_rows, cells, cell)
    gram_CMM = gram_II.view(cells, cell, cells, cell).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    change_RCMM = grow_RI.view(num_rows, cells, cell, 1) + drop_RI.view(num_rows, cells, 1, cell)
    change_RCMM = change_RCMM - 2 * weight_RCM[..., :, None] * weight_RCM[..., None, :] * gram_CMM
    change_RC, pair_RC = change_RCMM.flatten(2).min(dim=2)
    count = min(candidates, cells)
    cell_RK = change_RC.topk(count, dim=1, largest=False).indices
    pair_RK = pair_RC.gather(1, cell_RK)
    places_RS = torch.cat([cell_RK * cell + pair_RK // cell, cell_RK * cell + pair_RK % cell], dim=1)
    return places_RS, torch.eye(count, dtype=torch.bool, device=grow_RI.device)


def _best_pairs(
    weight_RS: Tensor, pull_RS: Tensor, gram_RSS: Tensor, eligible_RS: Tensor, partners_KK: Tensor, enough_R: Tensor
) -> Tensor:
    """Exchange the best pair among the candidates, then the best one given that, and so on; each weight once.

    Args:
        weight_RS, pull_RS, gram_RSS: w, c and G of the candidates, of which the first half is pruned.
        eligible_RS: whether a candidate is one: rows may have fewer pruned or kept weights.
        partners_KK: which pruned candidate may pair with which kept one.
        enough_R: an exchange has to change the row's error by less than this, which is not above zero.

    Returns which candidates have changed sides: (R, S).
    """
    num_rows, half = len(weight_RS), weight_RS.shape[1] // 2
    own_RS = weight_RS.square() * gram_RSS.diagonal(dim1=1, dim2=2)
    sign_S = torch.ones_like(weight_RS[0]).index_fill_(0, torch.arange(half, device=weight_RS.device), -1)
    cross_RKK = 2 * weight_RS[:, :half, None] * weight_RS[:, None, half:] * gram_RSS[:, :half, half:]
    cross_RKK = cross_RKK.masked_fill(~partners_KK, -torch.inf)
    changed_RS = torch.zeros_like(eligible_RS)
    for _ in range(half):
        cost_RS = (own_RS + 2 * sign_S * weight_RS * pull_RS).masked_fill(~eligible_RS, torch.inf)
        change_RKK = cost_RS[:, :half, None] + cost_RS[:, None, half:] - cross_RKK
        best_R, pair_R = change_RKK.flatten(1).min(dim=1)
        goes_R = best_R < enough_R
        if weight_RS.device.type == "cpu" and not goes_R.any():
            break
        pair_R2 = torch.stack([pair_R // half, half + pair_R % half], dim=1)
        chosen_RS = torch.zeros_like(eligible_RS).scatter_(1, pair_R2, goes_R[:, None].expand(num_rows, 2))
        step_R2 = (weight_RS * sign_S).gather(1, pair_R2) * goes_R[:, None]
        rows_R2S = gram_RSS.gather(1, pair_R2[:, :, None].expand(-1, -1, gram_RSS.shape[2]))
        pull_RS = pull_RS + (step_R2[:, :, None] * rows_R2S).sum(dim=1)
        changed_RS |= chosen_RS
        eligible_RS = eligible_RS & ~chosen_RS
    return changed_RS
