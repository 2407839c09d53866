"""DSnoT: every output row exchanges weights until what the pruned ones add up to is made up for.

Source: Dynamic Sparse No Training, arXiv 2310.08915, section 3.2; where the paper leaves something open, the authors'
implementation decides, but for N:M cells (see `DSnoT`).
"""

from dataclasses import dataclass

import torch

from barber.errors import require_counts, require_not_negative
from barber.methods.block import BlockState, Pruned
from barber.methods.patterns import NM, Pattern
from barber.methods.rebuild.base import Needs, Rebuilt
from barber.methods.statistics import Moments
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class DSnoT:
    """Grow and prune one weight of every output row a cycle, as long as the row's expected error shrinks.

    With A_i = W_i t_i what weight i adds to the row's output (t_i the mean over samples of the token sum of input i),
    the expected error e is the sum of A over the pruned weights. The weight that grows is the pruned one with the most
    A / variance of its input in the direction of e; the one that goes is the kept one of the lowest Wanda score whose A
    has the other sign. A row is done when |e| is within the threshold, when an exchange would not lower it, or when no
    pair is left; a weight changes sides once at most. With N:M the pair lies inside a cell, and what grows is chosen
    among the cells that have a weight to give. The masks alone change; kept weights are the dense ones.

    Args:
        cycles: at most so many exchanges a row.
        threshold: the |e| that is small enough.
    """

    cycles: int = 50
    threshold: float = 0.1

    def __post_init__(self) -> None:
        require_counts(self, "cycles")
        require_not_negative(self, "threshold")

    @property
    def needs(self) -> Needs:
        """Moments of the inputs."""
        return Needs(Moments)

    def check(self, pattern: Pattern) -> None:
        """Every pattern is allowed."""

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        """New masks for a block's linears, each by itself."""
        rebuilt = {}
        for name in block.names:
            weight_OI, moments_3I, pattern = block.dense_OI[name], block.inputs[name], block.patterns[name]
            cell = pattern.m if isinstance(pattern, NM) else None
            mask_OI, count_O = exchange_by_sums(
                weight_OI, moments_3I, block.pruned[name].mask_OI, self.cycles, self.threshold, cell
            )
            rebuilt[name] = Rebuilt(Pruned.masking(weight_OI, mask_OI), count_O.sum(), moments_3I)
        return rebuilt


def exchange_by_sums(
    weight_OI: Tensor, moments_3I: Tensor, pruned_OI: Tensor, cycles: int, threshold: float, cell: int | None = None
) -> tuple[Tensor, Tensor]:
    """Exchange one pruned and one kept weight of every output row a cycle, while the row's |e| falls.

    Args:
        weight_OI: float32.
        moments_3I: as `Moments` gives it.
        pruned_OI: the mask to begin with.
        cycles, threshold: as in `DSnoT`.
        cell: the m of an N:M pattern, where a pair has to lie inside a cell; None: anywhere in the row.

    Returns the new mask (O, I) and the number of exchanges of every row (O,), int64.
    """
    total_I, variance_I, squares_I = moments_3I
    result_OI, count_O = pruned_OI.clone(), torch.zeros(len(weight_OI), dtype=torch.int64, device=weight_OI.device)
    rows_R = torch.arange(len(weight_OI), device=weight_OI.device)
    added_RI = weight_OI * total_I  # A
    error_R1 = added_RI.masked_fill(~pruned_OI, 0).sum(dim=1, keepdim=True)
    # An input that never changes is the surest of all; what it would be divided by must not make NaN or infinity of it.
    limits = torch.finfo(weight_OI.dtype)
    sureness_RI = (added_RI / variance_I.clamp(min=limits.tiny)).clamp(limits.min, limits.max)
    score_RI = weight_OI.abs() * squares_I.sqrt()
    to_grow_RI, to_prune_RI = pruned_OI, ~pruned_OI
    for _ in range(cycles):
        sign_R1 = error_R1.sign()
        givers_RI = to_prune_RI & (added_RI * sign_R1 < 0)
        growers_RI = to_grow_RI if cell is None else to_grow_RI & _in_cells_with(givers_RI, cell)
        grown_R1 = (sureness_RI * sign_R1).masked_fill(~growers_RI, -torch.inf).argmax(dim=1, keepdim=True)
        givers_RI = givers_RI if cell is None else givers_RI & _in_cell_of(grown_R1, givers_RI, cell)
        gone_R1 = score_RI.masked_fill(~givers_RI, torch.inf).argmin(dim=1, keepdim=True)
        after_R1 = error_R1 + added_RI.gather(1, gone_R1) - added_RI.gather(1, grown_R1)
        goes_R1 = growers_RI.gather(1, grown_R1) & givers_RI.gather(1, gone_R1)
        goes_R1 &= (error_R1.abs() > threshold) & (after_R1.abs() < error_R1.abs())
        pair_R2 = torch.cat([grown_R1, gone_R1], dim=1)
        moved_RI = torch.zeros_like(to_grow_RI).scatter_(1, pair_R2, goes_R1.expand(-1, 2))
        result_OI[rows_R] = result_OI[rows_R] ^ moved_RI
        count_O[rows_R] += goes_R1[:, 0]
        # Where nothing moves, nothing will: the next cycle would see the same row.
        to_grow_RI, to_prune_RI = to_grow_RI & ~moved_RI, to_prune_RI & ~moved_RI
        error_R1 = torch.where(goes_R1, after_R1, error_R1)
        if weight_OI.device.type == "cpu":  # a GPU is not asked
            on_R = goes_R1[:, 0]
            if not on_R.any():
                break
            if not on_R.all():
                rows_R, error_R1 = rows_R[on_R], error_R1[on_R]
                to_grow_RI, to_prune_RI = to_grow_RI[on_R], to_prune_RI[on_R]
                added_RI, sureness_RI, score_RI = added_RI[on_R], sureness_RI[on_R], score_RI[on_R]
    return result_OI, count_O


def _in_cells_with(some_RI: Tensor, m: int) -> Tensor:
    """Which weights share their cell with one of some: (R, I)."""
    some_RCM = some_RI.view(len(some_RI), -1, m)
    return some_RCM.any(dim=2, keepdim=True).expand_as(some_RCM).reshape(some_RI.shape)


def _in_cell_of(place_R1: Tensor, like_RI: Tensor, m: int) -> Tensor:
    """Which weights share their cell with one of their row: (R, I)."""
    return torch.arange(like_RI.shape[1], device=like_RI.device) // m == place_R1 // m
