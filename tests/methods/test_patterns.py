"""Sparsity patterns: which weights compete, how many go, and which patterns make no sense."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from barber.methods.patterns import NM, Exactly, Unstructured
from tests import oracles

# Neither a slow machine nor chance may fail these tests.
QUICK = settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
CELLS = [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)]

ratios = st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9]) | st.floats(0, 0.99)


@st.composite
def matrices(draw: st.DrawFn, m: int = 1) -> torch.Tensor:
    """Scores (O, I), I a multiple of m, many of them tied; one matrix in two lies in memory as GPT-2 stores weights."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 16 // m)) * m
    # The numbers come from a seed: arrays that hypothesis draws are mostly one value.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    score_OI = torch.randint(draw(st.sampled_from([1, 3, 10, 2**20])), shape, generator=generator).float()
    return score_OI.T.contiguous().T if draw(st.booleans()) else score_OI


@QUICK
@given(matrices(), ratios)
def test_unstructured_rows_lose_the_lowest_share_of_each(score: torch.Tensor, sparsity: float) -> None:
    expected = [oracles.lowest(row, int(len(row) * sparsity)) for row in score.tolist()]
    assert Unstructured(sparsity).prune_rows(score).tolist() == expected


@QUICK
@given(matrices(), ratios.filter(bool))
def test_unstructured_whole_loses_the_lowest_share_and_one_more(score: torch.Tensor, sparsity: float) -> None:
    expected = oracles.lowest_with_the_next(score.flatten().tolist(), sparsity)
    assert Unstructured(sparsity).prune_whole(score).flatten().tolist() == expected


@pytest.mark.parametrize("scores", [torch.rand(4, 8), torch.ones(4, 8)], ids=["different", "equal"])
def test_the_threshold_takes_one_more_than_the_share_and_no_ties_besides(scores: torch.Tensor) -> None:
    """As in the published code the score at the threshold goes too."""
    assert Unstructured(0.5).prune_whole(scores).sum() == 17


def test_no_sparsity_prunes_nothing() -> None:
    score = torch.zeros(3, 4)
    assert not Unstructured(0).prune_whole(score).any()
    assert not Unstructured(0).prune_rows(score).any()


@pytest.mark.parametrize(("n", "m"), CELLS)
@QUICK
@given(data=st.data())
def test_nm_keeps_the_n_highest_of_every_m(n: int, m: int, data: st.DataObject) -> None:
    score = data.draw(matrices(m))
    expected = [oracles.lowest_of_cells(row, n, m) for row in score.tolist()]
    assert NM(n, m).prune_rows(score).tolist() == expected
    assert NM(n, m).prune_whole(score).tolist() == expected


def evenly(score: torch.Tensor, num_pruned: int) -> list[list[bool]]:
    """The lowest of every row, as many of each; then the lowest of what comes next in them, one of each at most."""
    outputs = len(score)
    each, rest = num_pruned // outputs, num_pruned % outputs
    following = [sorted(row)[each] if rest else 0.0 for row in score.tolist()]
    more = oracles.lowest(following, rest)
    return [oracles.lowest(row, each + more[i]) for i, row in enumerate(score.tolist())]


@QUICK
@given(matrices(), st.data())
def test_exactly_takes_the_lowest_of_rows_evenly(score: torch.Tensor, data: st.DataObject) -> None:
    num_pruned = data.draw(st.integers(0, score.numel()))
    mask = Exactly(num_pruned).prune_rows(score)
    assert mask.tolist() == evenly(score, num_pruned)
    assert mask.sum() == num_pruned


@QUICK
@given(matrices(), st.data())
def test_exactly_takes_the_lowest_of_the_whole(score: torch.Tensor, data: st.DataObject) -> None:
    num_pruned = data.draw(st.integers(0, score.numel()))
    mask = Exactly(num_pruned).prune_whole(score)
    assert mask.flatten().tolist() == oracles.lowest(score.flatten().tolist(), num_pruned)
    assert mask.sum() == num_pruned


@QUICK
@given(matrices(), st.integers(1, 16), st.data())
def test_exactly_takes_a_share_of_every_block_of_columns(score: torch.Tensor, width: int, data: st.DataObject) -> None:
    inputs = score.shape[1]
    num_pruned = data.draw(st.integers(0, score.numel()))
    pruned = 0
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        mask = Exactly(num_pruned).of_columns(start, stop, inputs).prune_whole(score[:, start:stop])
        assert abs(int(mask.sum()) - num_pruned * (stop - start) / inputs) < 1
        pruned += int(mask.sum())
    assert pruned == num_pruned


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_a_share_is_the_same_in_every_block_of_columns(pattern: Unstructured | NM) -> None:
    assert pattern.of_columns(128, 200, 200) == pattern


@pytest.mark.parametrize(("n", "m", "sparsity"), [(2, 4, 0.5), (4, 8, 0.5), (1, 4, 0.75), (3, 4, 0.25)])
def test_nm_is_n_kept_of_m(n: int, m: int, sparsity: float) -> None:
    assert NM(n, m).sparsity == sparsity
    assert str(NM(n, m)) == f"{n}:{m}"
