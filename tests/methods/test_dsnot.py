"""DSnoT against a loop over rows and cycles: which weights it exchanges, when a row is done, what stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barber import NM, Unstructured
from barber.methods.block import Pruned
from barber.methods.patterns import Pattern
from barber.methods.rebuild import DSnoT, Needs
from barber.methods.rebuild.dsnot import exchange_by_sums
from barber.methods.statistics import Moments
from tests.states import state

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def case(seed: int, outputs: int = 4, inputs: int = 16, pattern: Pattern | None = None) -> Case:
    """A weight, its inputs' moments, and a mask by Wanda's score."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    scale_I = torch.rand(inputs, generator=generator) + 0.1
    x_TI = torch.randn(40, inputs, generator=generator) * scale_I + torch.randn(inputs, generator=generator)
    statistic = Moments(4)
    statistic.add(x_TI)
    moments_3I = statistic.value()
    score_OI = weight_OI.abs() * moments_3I[2].sqrt()
    return weight_OI, moments_3I, (pattern or Unstructured(0.5)).prune_rows(score_OI)


def error_of(weight_OI: torch.Tensor, moments_3I: torch.Tensor, mask_OI: torch.Tensor) -> torch.Tensor:
    """e of every row."""
    return (weight_OI * moments_3I[0]).masked_fill(~mask_OI, 0).sum(dim=1)


def row_after(
    weight: list[float],
    moments: list[list[float]],
    pruned: list[bool],
    cycles: int,
    threshold: float,
    cell: int | None = None,
) -> tuple[list[bool], int]:
    """A row's mask and its number of exchanges, weight by weight."""
    total, variance, squares = moments
    places = range(len(weight))
    added = [weight[i] * total[i] for i in places]
    growing, going = {i for i in places if pruned[i]}, {i for i in places if not pruned[i]}
    after = list(pruned)
    error, count = sum(added[i] for i in growing), 0

    def partners(place: int, sign: int) -> list[int]:
        return [i for i in sorted(going) if added[i] * sign < 0 and (cell is None or i // cell == place // cell)]

    for _ in range(cycles):
        sign = 1 if error > 0 else -1
        growers = [i for i in sorted(growing) if partners(i, sign)]
        if abs(error) <= threshold or not growers:
            break
        grown = max(growers, key=lambda i: sign * added[i] / variance[i])
        gone = min(partners(grown, sign), key=lambda i: abs(weight[i]) * squares[i] ** 0.5)
        changed = error + added[gone] - added[grown]
        if abs(changed) >= abs(error):
            break
        after[grown], after[gone] = False, True
        growing.remove(grown)
        going.remove(gone)
        error, count = changed, count + 1
    return after, count


seeds = st.integers(0, 10_000)
cells = pytest.mark.parametrize("cell", [None, 4], ids=["row", "2:4"])


@cells
@settings(deadline=None)
@given(seed=seeds, cycles=st.integers(1, 12), threshold=st.sampled_from([0.0, 0.1, 1.0, 5.0]))
def test_weights_are_exchanged_as_row_by_row(cell: int | None, seed: int, cycles: int, threshold: float) -> None:
    weight_OI, moments_3I, mask_OI = case(seed, pattern=NM(2, 4) if cell else None)
    found_OI, count_O = exchange_by_sums(weight_OI, moments_3I, mask_OI, cycles, threshold, cell)
    for row, weight_I in enumerate(weight_OI.tolist()):
        expected, count = row_after(weight_I, moments_3I.tolist(), mask_OI[row].tolist(), cycles, threshold, cell)
        assert found_OI[row].tolist() == expected
        assert count_O[row] == count


@cells
@settings(deadline=None)
@given(seed=seeds)
def test_the_expected_error_never_grows_and_the_sparsity_stays(cell: int | None, seed: int) -> None:
    weight_OI, moments_3I, mask_OI = case(seed, pattern=NM(2, 4) if cell else None)
    error_O = error_of(weight_OI, moments_3I, mask_OI).abs()
    for cycles in range(1, 8):
        found_OI, count_O = exchange_by_sums(weight_OI, moments_3I, mask_OI, cycles, 0.1, cell)
        now_O = error_of(weight_OI, moments_3I, found_OI).abs()
        assert (now_O <= error_O + 1e-5).all()
        assert torch.equal(count_O, (mask_OI & ~found_OI).sum(dim=1)) and (count_O <= cycles).all()
        assert torch.equal(found_OI.sum(dim=1), mask_OI.sum(dim=1))
        if cell:
            assert (found_OI.view(-1, 4).sum(dim=1) == 2).all()
        error_O = now_O


def test_a_row_whose_error_is_small_enough_is_left_alone() -> None:
    weight_OI, moments_3I, mask_OI = case(1)
    largest = error_of(weight_OI, moments_3I, mask_OI).abs().max().item()
    found_OI, count_O = exchange_by_sums(weight_OI, moments_3I, mask_OI, 50, largest + 1e-3)
    assert torch.equal(found_OI, mask_OI) and not count_O.any()


def test_inputs_that_never_change_or_never_come_are_no_trouble() -> None:
    weight_OI, moments_3I, mask_OI = case(2, outputs=16, inputs=64)
    moments_3I[1, :6] = 0  # never change
    moments_3I[:, 6:10] = 0  # never come
    found_OI, count_O = exchange_by_sums(weight_OI, moments_3I, mask_OI, 50, 0)
    error_O, after_O = (error_of(weight_OI, moments_3I, which_OI).abs() for which_OI in (mask_OI, found_OI))
    assert count_O.any() and (after_O <= error_O + 1e-5).all()
    assert torch.equal(found_OI.sum(dim=1), mask_OI.sum(dim=1))


@pytest.mark.parametrize("sparsity", [0, 0.07, 0.94])
def test_rows_with_hardly_a_pair(sparsity: float) -> None:
    weight_OI, moments_3I, mask_OI = case(3, pattern=Unstructured(sparsity))
    found_OI, _ = exchange_by_sums(weight_OI, moments_3I, mask_OI, 50, 0)
    assert torch.equal(found_OI.sum(dim=1), mask_OI.sum(dim=1))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_the_method_keeps_dense_weights_and_counts_pairs(pattern: Pattern) -> None:
    weight_OI, moments_3I, mask_OI = case(4, pattern=pattern)
    pruned = {"linear": Pruned.masking(weight_OI + 1, mask_OI)}
    step = DSnoT()
    found = step.rebuild(state({"linear": weight_OI}, pattern, pruned, inputs={"linear": moments_3I}))["linear"]
    after_OI = found.pruned.mask_OI
    assert found.num_exchanged == (mask_OI & ~after_OI).sum() > 0
    assert torch.equal(found.pruned.weight_OI, weight_OI.masked_fill(after_OI, 0))
    assert step.needs == Needs(Moments)
