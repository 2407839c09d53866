"""Choosing by thresholds, where scores tie in every way that floats can: as plain sorts do it, on every kind of device.

`test_masks` has the rules for scores of any kind; here are zeros of both signs, neighbours in the last bit, groups
without pruned or without kept members, and the branch of devices that must not be waited for.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from barber.methods import masks
from tests import oracles

QUICK = settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

#: Both zeros, which are equal; the smallest number there is; numbers that differ in the last bit; the largest.
VALUES = [-0.0, 0.0, 2.0**-149, 1.0, 1 + 2.0**-23, 1 + 2.0**-22, 3.4e38]
#: Differences of these are exact: the order of gains is a matter of the rule, not of rounding.
WHOLE = [-0.0, 0.0, 1.0, 2.0, 3.0]
PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 8)]

alphas = st.sampled_from([0.0, 0.5, 1.0])
cells = pytest.mark.parametrize(("n", "m"), PATTERNS, ids=[f"{n}:{m}" for n, m in PATTERNS])

Case = tuple[torch.Tensor, torch.Tensor]


class Elsewhere(torch.Tensor):
    """A tensor that says it were on a GPU."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


@pytest.fixture(params=["cpu", "elsewhere"], scope="module", autouse=True)
def kind_of_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Thresholds as they are found on a CPU, and as they are found on all other devices."""
    if request.param == "cpu":
        yield "cpu"
        return
    kth_lowest = masks._kth_lowest

    def elsewhere(score_GM: torch.Tensor, k_G: torch.Tensor) -> torch.Tensor:
        return kth_lowest(score_GM.as_subclass(Elsewhere), k_G).as_subclass(torch.Tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_kth_lowest", elsewhere)
        yield "elsewhere"


def few(values: list[float]) -> st.SearchStrategy[list[float]]:
    """Some of the values: often one or two, so that whole groups tie."""
    return st.lists(st.sampled_from(values), min_size=1, max_size=4, unique_by=str)


@st.composite
def scores(draw: st.DrawFn, groups: int, members: int, values: list[float] = VALUES) -> torch.Tensor:
    choice = draw(few(values))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    index_GM = torch.randint(len(choice), (groups, members), generator=generator)
    return torch.tensor(choice, dtype=torch.float32)[index_GM]


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Scores (G, M); they may lie in memory group by group or member by member."""
    groups, members = draw(st.integers(1, 6)), draw(st.integers(1, 17))
    if draw(st.booleans()):
        return draw(scores(members, groups)).T
    return draw(scores(groups, members))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Scores (G, M) and any mask; every group may be all pruned, all kept, all but one of them, or mixed."""
    score_GM = draw(matrices())
    groups, members = score_GM.shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    pruned_GM = torch.rand(groups, members, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    for group, kind in enumerate(draw(st.lists(st.sampled_from(["all", "none", "one", "rest", ""]), max_size=groups))):
        if kind:
            pruned_GM[group] = kind in ("all", "rest")
        if kind in ("one", "rest"):
            pruned_GM[group, draw(st.integers(0, members - 1))] ^= True
    return score_GM, pruned_GM


@st.composite
def rows_of_cells(draw: st.DrawFn, n: int, m: int, values: list[float] = VALUES) -> Case:
    """Scores (O, I) and a mask that keeps any `n` of every `m`."""
    rows, number = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    order_CM = torch.rand(rows * number, m, generator=generator).argsort(dim=1)
    return draw(scores(rows, number * m, values)), (order_CM < m - n).view(rows, number * m)


def row_by_row(oracle: Any, score: torch.Tensor, pruned: torch.Tensor, *rest: Any) -> tuple[list[Any], list[int]]:
    results = [oracle(row, gone, *rest) for row, gone in zip(score.tolist(), pruned.tolist(), strict=True)]
    return [mask for mask, _ in results], [count for _, count in results]


def check(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[list[Any], list[int]]) -> None:
    mask, count = found
    assert (mask.tolist(), count.tolist()) == expected
    assert (mask.dtype, count.dtype) == (torch.bool, torch.int64)


@QUICK
@given(matrices(), st.data())
def test_lowest(score: torch.Tensor, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([0, 1, score.shape[1] // 2, score.shape[1] - 1, score.shape[1]]))
    expected = [oracles.lowest(row, count) for row in score.tolist()]
    assert masks.lowest(score, count).tolist() == expected


@QUICK
@given(matrices(), st.data())
def test_at_most_the(score: torch.Tensor, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, score.shape[1] - 1))
    expected = [[value <= sorted(row)[index] for value in row] for row in score.tolist()]
    assert masks.at_most_the(index, score).tolist() == expected


@QUICK
@given(cases(), alphas)
def test_exchange(case: Case, alpha: float) -> None:
    check(masks.exchange(*case, alpha), row_by_row(oracles.exchange, *case, alpha))


@cells
@QUICK
@given(data=st.data(), alpha=alphas)
def test_exchange_cells_by_row(n: int, m: int, data: st.DataObject, alpha: float) -> None:
    case = data.draw(rows_of_cells(n, m))
    check(masks.exchange_cells_by_row(*case, alpha, m), row_by_row(oracles.exchange_nm_by_row, *case, alpha, m))


@cells
@QUICK
@given(data=st.data(), alpha=alphas)
def test_exchange_inside_cells(n: int, m: int, data: st.DataObject, alpha: float) -> None:
    case = data.draw(rows_of_cells(n, m, WHOLE))
    check(masks.exchange_inside_cells(*case, alpha, m), row_by_row(oracles.exchange_nm_in_cells, *case, alpha, m))


@QUICK
@given(cases())
def test_nothing_is_changed_in_place(case: Case) -> None:
    score, pruned = (tensor.clone() for tensor in case)
    masks.exchange(*case, 1.0)
    masks.lowest(case[0], 1)
    assert torch.equal(case[0], score) and torch.equal(case[1], pruned)


@pytest.mark.parametrize("score", [0.0, -0.0, 1.0], ids=str)
def test_where_all_scores_are_equal_the_first_go_and_nothing_is_exchanged(score: float) -> None:
    score_GM = torch.full((3, 8), score)
    pruned_GM = masks.lowest(score_GM, 3)
    assert pruned_GM.tolist() == [[True] * 3 + [False] * 5] * 3
    mask_GM, count_G = masks.exchange(score_GM, pruned_GM, 1.0)
    assert torch.equal(mask_GM, pruned_GM) and not count_G.any()


def test_zeros_of_both_signs_are_equal() -> None:
    score_1M = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    assert masks.lowest(score_1M, 2).tolist() == [[True, True, False, False]]
    pruned_1M = torch.tensor([[True, False, False, True]])
    assert not masks.exchange(score_1M, pruned_1M, 1.0)[1].any()


def test_scores_that_are_no_numbers_end_in_a_mask_too() -> None:
    """The walk finds out about them when the block is done."""
    score_OI = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    pruned_OI = masks.lowest(score_OI.view(-1, 4), 2).view(6, 16)
    for value in (torch.nan, torch.inf, -torch.inf):
        for bad_OI in (score_OI.masked_fill(score_OI > 0.7, value), torch.full_like(score_OI, value)):
            for mask in (
                masks.lowest(bad_OI, 8),
                masks.at_most_the(8, bad_OI),
                masks.exchange(bad_OI, pruned_OI, 0.5)[0],
                masks.exchange_cells_by_row(bad_OI, pruned_OI, 0.5, 4)[0],
                masks.exchange_inside_cells(bad_OI, pruned_OI, 0.5, 4)[0],
            ):
                assert (mask.shape, mask.dtype) == (pruned_OI.shape, torch.bool)


def test_only_a_cpu_is_asked_for_the_largest_k(kind_of_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above have taken both ways."""
    topk = torch.Tensor.topk
    asked = []
    monkeypatch.setattr(torch.Tensor, "topk", lambda *args, **kwargs: asked.append(1) or topk(*args, **kwargs))
    masks.exchange(torch.rand(3, 8), torch.rand(3, 8) > 0.5, 0.5)
    assert bool(asked) == (kind_of_device == "cpu")
