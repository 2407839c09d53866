"""RIA's channel permutation: N:M cells of any inputs, dealt out and assigned as loops over all assignments say."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barber.methods.patterns import NM
from barber.methods.pruners import RIA
from barber.methods.pruners import ria as ria_module
from barber.methods.pruners.ria import permutation
from tests.methods.test_pruners import linear, prune

Cells = list[list[int]]


def kept(score: np.ndarray, cells: Cells, n: int) -> float:
    """The score that stays where every cell keeps its n best of every row."""
    return sum(sum(sorted((row[i] for i in cell), reverse=True)[:n]) for row in score for cell in cells)


def dealt_out(score: np.ndarray, m: int) -> Cells:
    """The inputs by falling score, one to each cell in turn, to and fro."""
    order = sorted(range(score.shape[1]), key=lambda i: -score[:, i].sum())
    count = len(order) // m
    cells: Cells = [[] for _ in range(count)]
    for member in range(m):
        hand = order[member * count : (member + 1) * count]
        for cell, i in zip(cells, reversed(hand) if member % 2 else hand, strict=True):
            cell.append(i)
    return cells


def best_last_members(score: np.ndarray, cells: Cells, n: int) -> float:
    """What is kept where the last members of all cells are given to the cells in the best of all possible ways."""
    ways = permutations([cell[-1] for cell in cells])
    return max(kept(score, [[*c[:-1], i] for c, i in zip(cells, way, strict=True)], n) for way in ways)


def scores(rows: int, inputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(inputs, generator=generator, dtype=torch.float64).square()
    return torch.rand(rows, inputs, generator=generator, dtype=torch.float64) * sizes


@pytest.mark.parametrize("at_a_time", [1, 2**24], ids=["piece by piece", "at once"])
@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 8)]), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_inputs_are_dealt_out_and_each_hand_is_assigned_as_keeps_the_most(
    at_a_time: int, n_of_m: tuple[int, int], count: int, rows: int, seed: int
) -> None:
    n, m = n_of_m
    score_OI = scores(rows, count * m, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ria_module, "_AT_A_TIME", at_a_time)
        order = permutation(score_OI, NM(n, m)).tolist()
    score, cells = score_OI.numpy(), [order[i : i + m] for i in range(0, len(order), m)]
    dealt = dealt_out(score, m)
    for hand, dealt_hand in zip(zip(*cells, strict=True), zip(*dealt, strict=True), strict=True):
        assert sorted(hand) == sorted(dealt_hand)
    assert kept(score, cells, n) == pytest.approx(best_last_members(score, cells, n))
    assert kept(score, cells, n) >= kept(score, dealt, n) - 1e-9


def test_large_weights_that_share_a_cell_are_kept_where_their_inputs_are_permuted() -> None:
    """Four inputs that matter lie in one cell, which would lose half of them."""
    weight_OI, x_NLI = linear()
    weight_OI[:, 4:8] *= 100
    natural, permuted = (prune(RIA(permute=permute), weight_OI, x_NLI, NM(2, 4)) for permute in (False, True))
    assert natural.mask_OI[:, 4:8].sum() == 2 * len(weight_OI)
    assert permuted.mask_OI[:, 4:8].sum() < 0.3 * natural.mask_OI[:, 4:8].sum()
    assert (permuted.mask_OI.sum(dim=1) == weight_OI.shape[1] // 2).all()
    assert torch.equal(permuted.weight_OI, weight_OI.masked_fill(permuted.mask_OI, 0))
