"""Choosing and exchanging weights: the vectorised functions against loops, and what must hold whatever the scores.

Scores tie in every way that floats can: zeros of both signs, neighbours in the last bit. Thresholds are found in one
way on a CPU and in another on devices that must not be waited for; every test is run with both.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from barber.methods import masks
from tests import oracles

# Neither a slow machine nor chance may fail these tests.
QUICK = settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
PATTERNS = [(2, 4), (4, 8), (1, 4), (3, 4)]
CELLS = pytest.mark.parametrize(("n", "m"), PATTERNS, ids=[f"{n}:{m}" for n, m in PATTERNS])

#: Both zeros, which are equal; the smallest number there is; numbers that differ in the last bit; the largest.
VALUES = [-0.0, 0.0, 2.0**-149, 1.0, 1 + 2.0**-23, 1 + 2.0**-22, 3.4e38]
#: Differences of these are exact: the order of gains is a matter of the rule, not of rounding.
WHOLE = [-0.0, *map(float, range(30))]
KINDS = ("odd", "few", "whole", "different")

alphas = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]) | st.floats(0, 1)
# Hypothesis picks sizes, ties and a seed; the numbers come from the seed, as its own arrays are mostly one value.
seeds = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))

Case = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(params=["cpu", "elsewhere"], scope="module", autouse=True)
def kind_of_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Thresholds as they are found on a CPU, and as they are found on all other devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_at_hand", lambda _: request.param == "cpu")
        yield request.param


@st.composite
def scores(draw: st.DrawFn, groups: int, members: int, kinds: Sequence[str] = KINDS) -> torch.Tensor:
    """All different, or of one to thirty values, often so few that whole groups tie."""
    generator = draw(seeds)
    kind = draw(st.sampled_from(kinds))
    if kind == "different":
        return torch.rand(groups, members, generator=generator)
    values = VALUES if kind == "odd" else WHOLE
    if kind != "whole":
        values = draw(st.lists(st.sampled_from(values), min_size=1, max_size=4, unique_by=str))
    index_GM = torch.randint(len(values), (groups, members), generator=generator)
    return torch.tensor(values, dtype=torch.float32)[index_GM]


@st.composite
def score_matrices(draw: st.DrawFn) -> torch.Tensor:
    """Scores (G, M); they may lie in memory group by group or member by member."""
    groups, members = draw(st.integers(1, 8)), draw(st.integers(1, 20))
    return draw(scores(members, groups)).T if draw(st.booleans()) else draw(scores(groups, members))


@st.composite
def groups(draw: st.DrawFn) -> Case:
    """Scores (G, M) and any mask; every group may be all pruned, all kept, all but one of them, or mixed."""
    score_GM = draw(score_matrices())
    pruned_GM = torch.rand(score_GM.shape, generator=draw(seeds)) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    kinds = draw(st.lists(st.sampled_from(["all", "none", "one", "rest", ""]), max_size=len(score_GM)))
    for group, kind in enumerate(kinds):
        if kind:
            pruned_GM[group] = kind in ("all", "rest")
        if kind in ("one", "rest"):
            pruned_GM[group, draw(st.integers(0, score_GM.shape[1] - 1))] ^= True
    return score_GM, pruned_GM


@st.composite
def rows_of_cells(draw: st.DrawFn, n: int, m: int, kinds: Sequence[str] = KINDS) -> Case:
    """Scores (O, I) and a mask that keeps `n` of every `m`, any of them."""
    rows, cells = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    score_OI = draw(scores(rows, cells * m, kinds))
    order_CM = torch.rand(rows * cells, m, generator=draw(seeds)).argsort(dim=1)
    return score_OI, (order_CM < m - n).view_as(score_OI)


def check(found: Case, case: Case, oracle: Any, *rest: Any) -> None:
    """The masks and counts of an oracle that takes one group at a time; what is given is left alone."""
    score, pruned = (tensor.clone() for tensor in case)
    mask, count = found
    results = [oracle(row, gone, *rest) for row, gone in zip(score.tolist(), pruned.tolist(), strict=True)]
    assert (mask.tolist(), count.tolist()) == ([gone for gone, _ in results], [number for _, number in results])
    assert (mask.dtype, count.dtype) == (torch.bool, torch.int64)
    assert torch.equal((pruned & ~mask).sum(dim=1), count)
    assert torch.equal(mask.sum(dim=1), pruned.sum(dim=1))


def kept_score(score: torch.Tensor, pruned: torch.Tensor, m: int) -> torch.Tensor:
    """The total of the kept scores of every cell of `m`."""
    return score.double().masked_fill(pruned, 0).view(-1, m).sum(dim=1)


@QUICK
@given(score_matrices(), st.data())
def test_lowest_prunes_the_lowest_of_every_group_and_the_earlier_of_equals(
    score: torch.Tensor, data: st.DataObject
) -> None:
    count = data.draw(st.sampled_from([0, 1, score.shape[1]]) | st.integers(0, score.shape[1]))
    expected = [oracles.lowest(row, count) for row in score.tolist()]
    assert masks.lowest(score, count).tolist() == expected


@QUICK
@given(score_matrices())
def test_scores_are_marked_evenly_in_an_order(score: torch.Tensor) -> None:
    """The numbers of marks of two groups differ by one at most."""
    order = masks.order_evenly(score)
    for total in range(score.numel() + 1):
        marked = masks.lowest_evenly(score, total)
        assert torch.equal(order < total, marked)
        assert marked.sum() == total
        number = marked.sum(dim=1)
        assert number.max() - number.min() <= 1


@QUICK
@given(groups(), alphas)
def test_exchange_is_the_papers(case: Case, alpha: float) -> None:
    before = [tensor.clone() for tensor in case]
    check(masks.exchange(*case, alpha), case, oracles.exchange, alpha)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(case, before, strict=True))


@QUICK
@given(groups())
def test_a_full_exchange_leaves_no_pair_worth_exchanging(case: Case) -> None:
    score, pruned = case
    mask, _ = masks.exchange(score, pruned, 1.0)
    best_pruned = score.masked_fill(~mask, -torch.inf).amax(dim=1)
    worst_kept = score.masked_fill(mask, torch.inf).amin(dim=1)
    assert (best_pruned <= worst_kept).all()


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
def test_exchange_of_cells_by_row_is_the_papers_and_every_cell_keeps_n_of_m(
    n: int, m: int, data: st.DataObject, alpha: float
) -> None:
    case = data.draw(rows_of_cells(n, m))
    found = masks.exchange_cells_by_row(*case, alpha, m)
    check(found, case, oracles.exchange_nm_by_row, alpha, m)
    assert ((~found[0]).view(-1, m).sum(dim=1) == n).all()


@CELLS
@QUICK
@given(data=st.data(), alpha=alphas)
def test_exchange_inside_cells_takes_the_largest_gains_of_the_row(
    n: int, m: int, data: st.DataObject, alpha: float
) -> None:
    case = data.draw(rows_of_cells(n, m, ("few", "whole")))
    check(masks.exchange_inside_cells(*case, alpha, m), case, oracles.exchange_nm_in_cells, alpha, m)


@CELLS
@QUICK
@given(data=st.data(), alpha=alphas)
def test_exchange_inside_cells_never_lowers_the_kept_score_of_a_cell(
    n: int, m: int, data: st.DataObject, alpha: float
) -> None:
    score, pruned = data.draw(rows_of_cells(n, m, KINDS[1:]))
    mask, count = masks.exchange_inside_cells(score, pruned, alpha, m)
    assert ((~mask).view(-1, m).sum(dim=1) == n).all()
    assert torch.equal((pruned & ~mask).sum(dim=1), count)
    before, after = kept_score(score, pruned, m), kept_score(score, mask, m)
    assert (after >= before).all()
    assert ((after > before) == (mask != pruned).view(-1, m).any(dim=1)).all()


@CELLS
@QUICK
@given(data=st.data())
def test_a_full_exchange_inside_cells_keeps_the_best_of_every_cell(n: int, m: int, data: st.DataObject) -> None:
    score, pruned = data.draw(rows_of_cells(n, m, KINDS[1:]))
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


@pytest.mark.parametrize("values", [[0.0] * 8, [-0.0] * 8, [1.0] * 8, [0.0, -0.0] * 4], ids=str)
def test_where_all_scores_are_equal_the_first_go_and_nothing_is_exchanged(values: list[float]) -> None:
    score_GM = torch.tensor([values] * 3)
    pruned_GM = masks.lowest(score_GM, 3)
    assert pruned_GM.tolist() == [[True] * 3 + [False] * 5] * 3
    mask_GM, count_G = masks.exchange(score_GM, pruned_GM, 1.0)
    assert torch.equal(mask_GM, pruned_GM) and not count_G.any()


def test_scores_that_are_no_numbers_end_in_a_mask_too() -> None:
    """The walk finds out about them when the block is done."""
    score_OI = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    pruned_OI = masks.lowest(score_OI.view(-1, 4), 2).view(6, 16)
    for value in (torch.nan, torch.inf, -torch.inf):
        for bad_OI in (score_OI.masked_fill(score_OI > 0.7, value), torch.full_like(score_OI, value)):
            for mask in (
                masks.lowest(bad_OI, 8),
                masks.exchange(bad_OI, pruned_OI, 0.5)[0],
                masks.exchange_cells_by_row(bad_OI, pruned_OI, 0.5, 4)[0],
                masks.exchange_inside_cells(bad_OI, pruned_OI, 0.5, 4)[0],
            ):
                assert (mask.shape, mask.dtype) == (pruned_OI.shape, torch.bool)
