"""Choosing and exchanging weights: the vectorised functions against loops, and what must hold whatever the scores."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from barber.methods import masks
from tests import oracles

# Neither a slow machine nor chance may fail these tests.
QUICK = settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
PATTERNS = [(2, 4), (4, 8), (1, 4), (3, 4)]
CELLS = pytest.mark.parametrize(("n", "m"), PATTERNS, ids=[f"{n}:{m}" for n, m in PATTERNS])

alphas = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]) | st.floats(0, 1)
# Hypothesis picks sizes, ties and a seed; the numbers come from the seed, as its own arrays are mostly one value.
seeds = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def matrices(draw: st.DrawFn, groups: int, members: int, whole: bool = False) -> torch.Tensor:
    """Scores: of one to thirty different values, so that many tie, or, unless they shall be `whole`, all different."""
    values = draw(st.sampled_from([1, 2, 3, 5, 30] + ([] if whole else [None, None, None])))
    generator = draw(seeds)
    if values is None:
        return torch.rand(groups, members, generator=generator)
    return torch.randint(values, (groups, members), generator=generator).float()


@st.composite
def score_matrices(draw: st.DrawFn) -> torch.Tensor:
    return draw(matrices(draw(st.integers(1, 8)), draw(st.integers(1, 20))))


@st.composite
def groups(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (G, M) and any mask; the first groups may be all pruned, and all kept."""
    score_GM = draw(score_matrices())
    share = draw(st.sampled_from([0.1, 0.5, 0.9]))
    pruned_GM = torch.rand(score_GM.shape, generator=draw(seeds)) < share
    for group, value in enumerate(draw(st.sampled_from([[], [True], [False], [True, False]]))[: len(pruned_GM)]):
        pruned_GM[group] = value
    return score_GM, pruned_GM


@st.composite
def rows_of_cells(draw: st.DrawFn, n: int, m: int, whole: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (O, I) and a mask that keeps `n` of every `m`, any of them."""
    rows, cells = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    score_OI = draw(matrices(rows, cells * m, whole))
    order_CM = torch.rand(rows * cells, m, generator=draw(seeds)).argsort(dim=1)
    return score_OI, (order_CM < m - n).view_as(score_OI)


def row_by_row(oracle: Any, score: torch.Tensor, pruned: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks and counts of an oracle that takes one group at a time."""
    results = [oracle(row, gone, *rest) for row, gone in zip(score.tolist(), pruned.tolist(), strict=True)]
    return torch.tensor([mask for mask, _ in results]), torch.tensor([count for _, count in results])


def kept_score(score: torch.Tensor, pruned: torch.Tensor, m: int) -> torch.Tensor:
    """The total of the kept scores of every cell of `m`."""
    return score.double().masked_fill(pruned, 0).view(-1, m).sum(dim=1)


@QUICK
@given(score_matrices(), st.data())
def test_lowest_prunes_the_lowest_of_every_group_and_the_earlier_of_equals(
    score: torch.Tensor, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, score.shape[1]))
    expected = [oracles.lowest(row, count) for row in score.tolist()]
    assert masks.lowest(score, count).tolist() == expected


@QUICK
@given(score_matrices())
def test_the_order_is_that_in_which_scores_are_marked_evenly(score: torch.Tensor) -> None:
    order = masks.order_evenly(score)
    for total in range(score.numel() + 1):
        marked = masks.lowest_evenly(score, total)
        assert torch.equal(order < total, marked)
        assert marked.sum() == total


@QUICK
@given(score_matrices())
def test_even_marks_differ_by_one_between_groups_at_most(score: torch.Tensor) -> None:
    for total in range(score.numel() + 1):
        number = masks.lowest_evenly(score, total).sum(dim=1)
        assert number.max() - number.min() <= 1


@QUICK
@given(score_matrices(), st.data())
def test_at_most_the_prunes_everything_up_to_the_threshold(score: torch.Tensor, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, score.shape[1] - 1))
    expected = [[value <= sorted(row)[index] for value in row] for row in score.tolist()]
    assert masks.at_most_the(index, score).tolist() == expected


@QUICK
@given(groups(), alphas)
def test_exchange_is_the_papers(case: tuple[torch.Tensor, torch.Tensor], alpha: float) -> None:
    mask, count = masks.exchange(*case, alpha)
    expected_mask, expected_count = row_by_row(oracles.exchange, *case, alpha)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(count, expected_count)


@QUICK
@given(groups(), alphas)
def test_exchange_leaves_the_number_of_pruned_weights_of_every_group(
    case: tuple[torch.Tensor, torch.Tensor], alpha: float
) -> None:
    score, pruned = case
    mask, count = masks.exchange(score, pruned, alpha)
    assert torch.equal(mask.sum(dim=1), pruned.sum(dim=1))
    assert torch.equal((pruned & ~mask).sum(dim=1), count)


@QUICK
@given(groups())
def test_a_full_exchange_leaves_no_pair_worth_exchanging(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    score, pruned = case
    mask, _ = masks.exchange(score, pruned, 1.0)
    best_pruned = score.masked_fill(~mask, -torch.inf).amax(dim=1)
    worst_kept = score.masked_fill(mask, torch.inf).amin(dim=1)
    assert (best_pruned <= worst_kept).all()


@QUICK
@given(groups())
def test_an_exchange_of_nothing_changes_nothing(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    mask, count = masks.exchange(*case, 0.0)
    assert torch.equal(mask, case[1])
    assert not count.any()


def test_the_number_exchanged_is_rounded_down_as_python_does() -> None:
    """0.29 * 100 is 28.999999999999996 in float64, and 29 in float32."""
    score = torch.cat([torch.full((1, 100), 2.0), torch.ones(1, 100)], dim=1)
    pruned = score > 1
    _, count = masks.exchange(score, pruned, 0.29)
    assert count.tolist() == [int(100 * 0.29)] == [28]


def test_a_group_that_takes_back_all_its_pruned_weights_loses_none_of_them() -> None:
    """The authors' thresholds lose one growth here."""
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    pruned = torch.tensor([[True, True, False, False]])
    assert masks.exchange(score, pruned, 1.0)[0].tolist() == [[False, False, True, True]]


@CELLS
@QUICK
@given(data=st.data(), alpha=alphas)
def test_exchange_of_cells_by_row_is_the_papers(n: int, m: int, data: st.DataObject, alpha: float) -> None:
    case = data.draw(rows_of_cells(n, m))
    mask, count = masks.exchange_cells_by_row(*case, alpha, m)
    expected_mask, expected_count = row_by_row(oracles.exchange_nm_by_row, *case, alpha, m)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(count, expected_count)


@CELLS
@QUICK
@given(data=st.data(), alpha=alphas)
def test_exchange_inside_cells_takes_the_largest_gains_of_the_row(
    n: int, m: int, data: st.DataObject, alpha: float
) -> None:
    # Gains of whole numbers are exact: the order of the pairs is a matter of the rule, not of rounding.
    case = data.draw(rows_of_cells(n, m, whole=True))
    mask, count = masks.exchange_inside_cells(*case, alpha, m)
    expected_mask, expected_count = row_by_row(oracles.exchange_nm_in_cells, *case, alpha, m)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(count, expected_count)


@CELLS
@pytest.mark.parametrize("function", [masks.exchange_cells_by_row, masks.exchange_inside_cells])
@QUICK
@given(data=st.data(), alpha=alphas)
def test_every_cell_keeps_n_of_m(function: Any, n: int, m: int, data: st.DataObject, alpha: float) -> None:
    score, pruned = data.draw(rows_of_cells(n, m))
    mask, count = function(score, pruned, alpha, m)
    assert ((~mask).view(-1, m).sum(dim=1) == n).all()
    assert torch.equal((pruned & ~mask).sum(dim=1), count)


@CELLS
@QUICK
@given(data=st.data(), alpha=alphas)
def test_exchange_inside_cells_never_lowers_the_kept_score_of_a_cell(
    n: int, m: int, data: st.DataObject, alpha: float
) -> None:
    score, pruned = data.draw(rows_of_cells(n, m))
    mask, _ = masks.exchange_inside_cells(score, pruned, alpha, m)
    before, after = kept_score(score, pruned, m), kept_score(score, mask, m)
    assert (after >= before).all()
    assert ((after > before) == (mask != pruned).view(-1, m).any(dim=1)).all()


@CELLS
@QUICK
@given(data=st.data())
def test_a_full_exchange_inside_cells_keeps_the_best_of_every_cell(n: int, m: int, data: st.DataObject) -> None:
    score, pruned = data.draw(rows_of_cells(n, m))
    mask, _ = masks.exchange_inside_cells(score, pruned, 1.0, m)
    best = torch.tensor([sum(sorted(cell, reverse=True)[:n]) for cell in score.double().view(-1, m).tolist()])
    assert torch.allclose(kept_score(score, mask, m), best.double(), rtol=1e-6)


def test_the_papers_exchange_of_cells_may_lose_score_in_a_cell() -> None:
    """The pairing is by row: the row's best pair is 5 for 1, yet 5 shares its cell with 6 and 7 only."""
    score = torch.tensor([[5.0, 4.0, 6.0, 7.0, 1.0, 2.0, 0.0, 0.0]])
    pruned = torch.tensor([[True, True, False, False, False, False, True, True]])
    mask, count = masks.exchange_cells_by_row(score, pruned, 0.5, 4)
    assert count.tolist() == [1]
    assert mask.tolist() == [[False, True, True, False, False, False, True, True]]
    inside, _ = masks.exchange_inside_cells(score, pruned, 0.5, 4)
    assert torch.equal(inside, pruned)
