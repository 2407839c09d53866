"""Exact pair exchange: every exchange lowers the error of its linear's output, and the best one goes first.

After SparseSwaps (arXiv 2512.10922), by the algebra of the quadratic: with r the lost weights of an output row (w where
pruned, else 0) and G = X X^T of the inputs, the row's output error is r^T G r, and with c = G r

    growing p and pruning q changes it by  w_p^2 G_pp - 2 w_p c_p  +  w_q^2 G_qq + 2 w_q c_q  -  2 w_p w_q G_pq.

What is fed to a linear, X, is the work of blocks that are pruned; the dense model feeds it X'. Quantisers that aim at
the dense output W X' instead of W X lose less over many layers (asymmetric calibration, GPTAQ, arXiv 2504.02692). Here
a share f of that drift is made up for: the error is that of W (X + f (X' - X)), and with D = f W (X' - X) X^T
(where the output is added to the residual stream, plus f (H' - H) X^T for the drift of that)

    || r X + f W (X' - X) ||^2 = r^T G r + 2 D r + a constant,  so all of the above holds with c = G r + D.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch.nn import functional

from barber.errors import require_counts, require_share
from barber.methods.block import BlockState, Pruned
from barber.methods.patterns import NM, Pattern
from barber.methods.rebuild.base import Needs, Rebuilt
from barber.methods.statistics import Hessian
from barber.runtime.tensors import Tensor

# Of a row's error: what rounding alone could gain.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Swaps:
    """Exchange pairs of an output row, or of an N:M cell, as long as the error of the linear's output falls.

    The masks alone change; kept weights are the dense ones. Rows are independent of each other, and all of them advance
    together: in a round every row looks at its most promising weights and exchanges the best pairs among them, each
    with its exact gain.

    Args:
        candidates: how many weights of each kind, or cells, a row looks at in a round, and the most that it exchanges.
        rounds: at most so many; it ends before where no pair gains.
        follow: the share of the drift between what the dense model feeds the linear and what it is fed now that the
            exchange makes up for, from 0 to 1.
    """

    candidates: int = 16
    rounds: int = 50
    follow: float = 0.0

    def __post_init__(self) -> None:
        require_counts(self, "candidates", "rounds")
        require_share(self, "follow")

    @property
    def needs(self) -> Needs:
        """The inputs' second moment; to follow, the dense model's inputs."""
        return Needs(Hessian, dense=self.follow > 0)

    def check(self, pattern: Pattern) -> None:
        """Every pattern is allowed."""

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        """New masks for a block's linears, each by itself."""
        rebuilt = {}
        for name in block.names:
            weight_OI, mask_OI, pattern = block.dense_OI[name], block.pruned[name].mask_OI, block.patterns[name]
            cell = pattern.m if isinstance(pattern, NM) else None
            score_SI = block.inputs[name]
            offset_OI = block.made_up_for(name, self.follow) if self.follow else None
            mask_OI, count_O = exchange_exactly(
                weight_OI, block.inputs[name], mask_OI, self.candidates, self.rounds, cell, offset_OI
            )
            if offset_OI is not None:
                score_SI = torch.cat([score_SI, offset_OI])
            rebuilt[name] = Rebuilt(Pruned.masking(weight_OI, mask_OI), count_O.sum(), score_SI)
        return rebuilt


def exchange_exactly(
    weight_OI: Tensor,
    gram_II: Tensor,
    pruned_OI: Tensor,
    candidates: int,
    rounds: int,
    cell: int | None = None,
    offset_OI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exchange pruned and kept weights of every output row while the row's error r^T G r + 2 D r falls.

    Args:
        weight_OI, gram_II: float32; G may have any scale.
        pruned_OI: the mask to begin with.
        candidates, rounds: as in `Swaps`.
        cell: the m of an N:M pattern, where a pair has to lie inside a cell; None: anywhere in the row.
        offset_OI: D, at the scale of G; None: 0.

    Returns the new mask (O, I) and the number of exchanges of every row (O,), int64.
    """
    result_OI, count_O = pruned_OI.clone(), torch.zeros(len(weight_OI), dtype=torch.int64, device=weight_OI.device)
    rows = _Rows.of(weight_OI, gram_II, pruned_OI, cell, offset_OI)
    for _ in range(rounds):
        exchanged_R = rows.exchange(gram_II, candidates)
        result_OI[rows.number_R] = rows.pruned_RI
        count_O[rows.number_R] += exchanged_R
        if weight_OI.device.type == "cpu":  # a GPU is not asked
            on_R = exchanged_R > 0
            if not on_R.any():
                break
            if not on_R.all():
                rows = rows.only(on_R)
    return result_OI, count_O


@dataclass
class _Rows:
    """The output rows that may still have something to exchange.

    Args:
        number_R: which ones they are.
        own_RI: w^2 G_ii, what a weight's loss costs by itself.
        pull_RI: r G, without D, which says nothing of what rounding can gain.
        offset_RI: D; None: 0.
    """

    number_R: Tensor
    weight_RI: Tensor
    pruned_RI: Tensor
    own_RI: Tensor
    pull_RI: Tensor
    offset_RI: Tensor | None
    cells: "_Cells | None"

    @classmethod
    def of(
        cls, weight_OI: Tensor, gram_II: Tensor, pruned_OI: Tensor, cell: int | None, offset_OI: Tensor | None
    ) -> "_Rows":
        """All rows of a linear."""
        return cls(
            torch.arange(len(weight_OI), device=weight_OI.device),
            weight_OI,
            pruned_OI,
            weight_OI.square() * gram_II.diagonal(),
            weight_OI.masked_fill(~pruned_OI, 0) @ gram_II,
            offset_OI,
            None if cell is None else _Cells.of(weight_OI, gram_II, cell),
        )

    def only(self, on_R: Tensor) -> "_Rows":
        """Some of them."""
        return _Rows(
            self.number_R[on_R],
            self.weight_RI[on_R],
            self.pruned_RI[on_R],
            self.own_RI[on_R],
            self.pull_RI[on_R],
            None if self.offset_RI is None else self.offset_RI[on_R],
            None if self.cells is None else self.cells.of_rows(on_R),
        )

    def exchange(self, gram_II: Tensor, candidates: int) -> Tensor:
        """A round: every row exchanges the best pairs of its most promising weights; how many, (R,), int64."""
        weight_RI, pruned_RI, pull_RI = self.weight_RI, self.pruned_RI, self.pull_RI
        enough_R = -_TOLERANCE * torch.linalg.vecdot(weight_RI * pruned_RI, pull_RI).clamp(min=0)
        whole_RI = pull_RI if self.offset_RI is None else pull_RI + self.offset_RI
        signed_RI = torch.where(pruned_RI, -weight_RI, weight_RI)
        cost_RI = torch.addcmul(self.own_RI, signed_RI, whole_RI, value=2)
        if self.cells is None:
            places_RS, partners_KK = _pairs_of_row(cost_RI, pruned_RI, candidates)
        else:
            places_RS, partners_KK = self.cells.pairs(cost_RI, pruned_RI, candidates)
        signed_RS = signed_RI.gather(1, places_RS)
        changed_RS = _best_pairs(
            cost_RI.gather(1, places_RS),
            signed_RS,
            gram_II[places_RS[:, :, None], places_RS[:, None, :]],
            pruned_RI.gather(1, places_RS),
            partners_KK,
            enough_R,
        )
        # Added up: a weight may be there twice, once as a candidate that it is not.
        flips_RI = torch.zeros_like(pruned_RI, dtype=torch.int8).scatter_add_(1, places_RS, changed_RS.to(torch.int8))
        self.pruned_RI = pruned_RI ^ (flips_RI > 0)
        self.pull_RI = pull_RI + _sum_of_rows(gram_II, places_RS, signed_RS, changed_RS)
        return changed_RS.sum(dim=1) // 2


def _sum_of_rows(gram_II: Tensor, places_RS: Tensor, step_RS: Tensor, changed_RS: Tensor) -> Tensor:
    """What the changes add to r G, (R, I): a few rows of G for every row, much less work than r G anew."""
    if gram_II.device.type != "cpu":  # a GPU is not asked which
        return functional.embedding_bag(places_RS, gram_II, mode="sum", per_sample_weights=step_RS * changed_RS)
    ends_R = changed_RS.sum(dim=1).cumsum(dim=0)
    starts_R = torch.cat([ends_R.new_zeros(1), ends_R[:-1]])
    return functional.embedding_bag(
        places_RS[changed_RS], gram_II, starts_R, mode="sum", per_sample_weights=step_RS[changed_RS]
    )


def _pairs_of_row(cost_RI: Tensor, pruned_RI: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """The K pruned weights and the K kept ones that would each gain most alone: (R, 2K); any may pair with any."""
    count = min(candidates, cost_RI.shape[1])
    halves = [cost_RI.masked_fill(others_RI, torch.inf) for others_RI in (~pruned_RI, pruned_RI)]
    places = [half_RI.topk(count, dim=1, largest=False).indices for half_RI in halves]
    return torch.cat(places, dim=1), torch.ones(count, count, dtype=torch.bool, device=cost_RI.device)


@dataclass(frozen=True)
class _Cells:
    """Pairs inside N:M cells. An exchange costs the same whichever of the two grows, so i < j are all pairs P.

    Pairs come first in shapes: cells are few numbers each, and a reduction over the first axis is one over long rows.

    Args:
        first_P, second_P: i and j, inside a cell.
        cross_PRC: 2 w_i w_j G_ij.
    """

    first_P: Tensor
    second_P: Tensor
    cross_PRC: Tensor

    @classmethod
    def of(cls, weight_OI: Tensor, gram_II: Tensor, m: int) -> "_Cells":
        """All of a linear."""
        first_P, second_P = torch.tensor(list(combinations(range(m), 2)), device=weight_OI.device).unbind(1)
        weight_MOC = _by_member(weight_OI, m)
        cells = weight_MOC.shape[2]
        gram_MMC = gram_II.view(cells, m, cells, m).diagonal(dim1=0, dim2=2)
        gram_P1C = gram_MMC[first_P, second_P][:, None]
        return cls(first_P, second_P, 2 * weight_MOC[first_P] * weight_MOC[second_P] * gram_P1C)

    def of_rows(self, which_R: Tensor) -> "_Cells":
        """Those of some rows."""
        return _Cells(self.first_P, self.second_P, self.cross_PRC[:, which_R])

    def pairs(self, cost_RI: Tensor, pruned_RI: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
        """The best pairs of the K cells that would gain most: (R, 2K), the pruned ones first; each its own partner."""
        cells = self.cross_PRC.shape[2]
        m = cost_RI.shape[1] // cells
        cost_MRC, pruned_MRC = _by_member(cost_RI, m), _by_member(pruned_RI, m)
        change_PRC = cost_MRC[self.first_P] + cost_MRC[self.second_P] - self.cross_PRC
        change_PRC.masked_fill_(pruned_MRC[self.first_P] == pruned_MRC[self.second_P], torch.inf)
        change_RC, pair_RC = change_PRC.min(dim=0)
        count = min(candidates, cells)
        cell_RK = change_RC.topk(count, dim=1, largest=False).indices
        pair_RK = pair_RC.gather(1, cell_RK)
        one_RK, other_RK = cell_RK * m + self.first_P[pair_RK], cell_RK * m + self.second_P[pair_RK]
        ordered_RK = pruned_RI.gather(1, one_RK)
        places = [torch.where(ordered_RK, one_RK, other_RK), torch.where(ordered_RK, other_RK, one_RK)]
        return torch.cat(places, dim=1), torch.eye(count, dtype=torch.bool, device=cost_RI.device)


def _by_member(matrix_RI: Tensor, m: int) -> Tensor:
    """Cells' members apart: (M, R, C)."""
    return matrix_RI.reshape(len(matrix_RI), -1, m).permute(2, 0, 1).contiguous()


def _best_pairs(
    cost_RS: Tensor, signed_RS: Tensor, gram_RSS: Tensor, pruned_RS: Tensor, partners_KK: Tensor, enough_R: Tensor
) -> Tensor:
    """Exchange the best pair among the candidates, then the best one given that, and so on; each weight once.

    Args:
        cost_RS: what a candidate's change of side costs alone; the first half is to grow.
        signed_RS: w of the candidates, negative where it is to grow.
        gram_RSS: G of the candidates.
        pruned_RS: whether a candidate is pruned: rows may have fewer pruned or kept weights than a half.
        partners_KK: which pruned candidate may pair with which kept one.
        enough_R: an exchange has to change the row's error by less than this, which is not above zero.

    Returns which candidates have changed sides: (R, S).
    """
    num_rows, half = len(cost_RS), cost_RS.shape[1] // 2
    is_kept_S = torch.arange(2 * half, device=cost_RS.device) >= half
    cost_RS = cost_RS.masked_fill(pruned_RS == is_kept_S, torch.inf)
    # What the change of one candidate adds to the cost of another one's.
    cross_RSS = gram_RSS.mul_(signed_RS[:, :, None]).mul_(2 * signed_RS[:, None, :])
    joint_RKK = cross_RSS[:, :half, half:].masked_fill(~partners_KK, torch.inf)
    changed_RS = torch.zeros_like(pruned_RS)
    for _ in range(half):
        change_RKK = cost_RS[:, :half, None] + cost_RS[:, None, half:] + joint_RKK
        best_R, pair_R = change_RKK.flatten(1).min(dim=1)
        goes_R1 = (best_R < enough_R)[:, None]
        if cost_RS.device.type == "cpu" and not goes_R1.any():
            break
        pair_R2 = torch.stack([pair_R // half, half + pair_R % half], dim=1)
        added_R2S = cross_RSS.gather(1, pair_R2[:, :, None].expand(-1, -1, 2 * half))
        cost_RS = cost_RS + added_R2S.sum(dim=1).masked_fill(~goes_R1, 0)
        chosen_RS = torch.zeros_like(changed_RS).scatter_(1, pair_R2, goes_R1.expand(num_rows, 2))
        cost_RS = cost_RS.masked_fill(chosen_RS, torch.inf)
        changed_RS |= chosen_RS
    return changed_RS
