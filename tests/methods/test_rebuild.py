"""Rebuilding the masks of a block: every granularity, metric and weight against loops over single weights."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from barber.errors import UserError
from barber.methods.block import Pruned
from barber.methods.metrics import Gradient, Metric, Weight, WeightGradient
from barber.methods.patterns import NM, Pattern, Unstructured
from barber.methods.rebuild import Barber, Rebuilt
from barber.methods.rebuild.barber import ALPHAS
from tests import oracles
from tests.states import state

SHAPES = {"gate": (6, 8), "up": (4, 8), "down": (8, 4)}
GRANULARITIES = ["output", "input", "layer", "block"]
METRICS = [WeightGradient(), Weight(), Gradient()]

Matrices = dict[str, torch.Tensor]
granularities = pytest.mark.parametrize("granularity", GRANULARITIES)
metrics = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)


def matrices(seed: int) -> Matrices:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def block(pattern: Pattern) -> tuple[Matrices, dict[str, Pruned], Matrices]:
    """Dense weights, what a pruner that updates weights left of them, and mean squared gradients."""
    dense, updates, other = matrices(0), matrices(1), matrices(2)
    # The mask comes from other numbers than weights and gradients, so that much is worth exchanging.
    mask = {name: pattern.prune_rows(other[name]) for name in SHAPES}
    pruned = {name: Pruned.masking(dense[name] + 0.5 * updates[name], mask[name]) for name in SHAPES}
    return dense, pruned, {name: matrix.square() for name, matrix in matrices(3).items()}


def expected_weight(dense: torch.Tensor, pruned: Pruned, retain: bool) -> torch.Tensor:
    """W of the method, weight by weight."""
    weight = dense.clone()
    for o, i in itertools.product(*map(range, dense.shape)):
        if retain and not pruned.mask_OI[o, i]:
            weight[o, i] = pruned.weight_OI[o, i]
    return weight


def expected_score(weight: torch.Tensor, squared: torch.Tensor, metric: Metric) -> torch.Tensor:
    """The metric, weight by weight."""
    score = torch.empty_like(weight)
    for o, i in itertools.product(*map(range, weight.shape)):
        size, gradient = abs(weight[o, i]), squared[o, i] ** 0.5
        score[o, i] = {Weight: size, Gradient: gradient, WeightGradient: size * gradient}[type(metric)]
    return score


def rebuilt(
    step: Barber, dense: Matrices, pruned: dict[str, Pruned], squared: Matrices, pattern: Pattern
) -> dict[str, Rebuilt]:
    """What the step makes of a block."""
    step.check(pattern)
    return step.rebuild(state(dense, pattern, pruned, gradient_OI=squared))


def masks_of(linears: dict[str, Pruned]) -> Matrices:
    return {name: linear.mask_OI for name, linear in linears.items()}


@metrics
@pytest.mark.parametrize("retain", [False, True], ids=["dense weights", "reconstructed weights"])
@granularities
def test_masks_are_rebuilt_as_weight_by_weight(granularity: str, retain: bool, metric: Metric) -> None:
    pattern = Unstructured(0.5)
    dense, pruned, squared = block(pattern)
    initial = masks_of(pruned)
    step = Barber(alpha=0.5, granularity=granularity, retain_reconstruction=retain, metric=metric)
    found = rebuilt(step, dense, pruned, squared, pattern)

    weight = {name: expected_weight(dense[name], pruned[name], retain) for name in dense}
    score = {name: expected_score(weight[name], squared[name], metric) for name in dense}
    expected, count = oracles.exchange_block(score, initial, granularity, 0.5)
    assert count > 0
    for name, linear in found.items():
        assert torch.equal(linear.pruned.mask_OI, expected[name])
        assert torch.equal(linear.pruned.weight_OI, weight[name].masked_fill(expected[name], 0))
        assert linear.num_exchanged == int((initial[name] & ~expected[name]).sum())
    assert sum(linear.num_exchanged for linear in found.values()) == count


@metrics
@pytest.mark.parametrize("retain", [False, True], ids=["dense weights", "reconstructed weights"])
@pytest.mark.parametrize("nm_exchange", ["row", "cell"])
def test_masks_of_cells_are_rebuilt_as_weight_by_weight(nm_exchange: str, retain: bool, metric: Metric) -> None:
    pattern = NM(2, 4)
    dense, pruned, squared = block(pattern)
    step = Barber(alpha=0.5, retain_reconstruction=retain, nm_exchange=nm_exchange, metric=metric)
    found = rebuilt(step, dense, pruned, squared, pattern)

    oracle = oracles.exchange_nm_by_row if nm_exchange == "row" else oracles.exchange_nm_in_cells
    total = 0
    for name, linear in found.items():
        score = expected_score(expected_weight(dense[name], pruned[name], retain), squared[name], metric)
        rows = zip(score.tolist(), pruned[name].mask_OI.tolist(), strict=True)
        expected = [oracle(row, gone, 0.5, 4) for row, gone in rows]
        assert linear.pruned.mask_OI.tolist() == [mask for mask, _ in expected]
        assert linear.num_exchanged == sum(count for _, count in expected)
        total += linear.num_exchanged
    assert total > 0


def test_a_block_moves_sparsity_between_its_linears_and_counts_where_weights_grew() -> None:
    weight = {"small": torch.tensor([[1.0, 2.0]]), "large": torch.tensor([[8.0, 9.0]])}
    pruned = {
        "small": Pruned.masking(weight["small"], torch.tensor([[False, False]])),
        "large": Pruned.masking(weight["large"], torch.tensor([[True, True]])),
    }
    step = Barber(alpha=1.0, granularity="block", metric=Weight())
    found = rebuilt(step, weight, pruned, {}, Unstructured(0.5))
    assert found["small"].pruned.weight_OI.tolist() == [[0, 0]]
    assert found["large"].pruned.weight_OI.tolist() == [[8, 9]]
    assert (found["small"].num_exchanged, found["large"].num_exchanged) == (0, 2)


@granularities
def test_a_rebuilt_group_has_as_many_pruned_weights_as_before(granularity: str) -> None:
    pattern = Unstructured(0.5)
    dense, pruned, squared = block(pattern)
    initial = masks_of(pruned)
    found = rebuilt(Barber(alpha=1.0, granularity=granularity), dense, pruned, squared, pattern)
    after = masks_of({name: linear.pruned for name, linear in found.items()})
    count = {
        "output": lambda masks: [mask.sum(dim=1).tolist() for mask in masks.values()],
        "input": lambda masks: [mask.sum(dim=0).tolist() for mask in masks.values()],
        "layer": lambda masks: [mask.sum().item() for mask in masks.values()],
        "block": lambda masks: sum(mask.sum().item() for mask in masks.values()),
    }[granularity]
    assert count(after) == count(initial)
    assert any(not torch.equal(after[name], initial[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("pattern", "granularity", "nm_exchange"),
    [(Unstructured(0.5), granularity, "row") for granularity in GRANULARITIES]
    + [(NM(2, 4), "output", "row"), (NM(2, 4), "output", "cell")],
    ids=str,
)
def test_transposed_weights_are_rebuilt_like_any_other(pattern: Pattern, granularity: str, nm_exchange: str) -> None:
    """GPT-2 stores its weights that way."""
    dense, pruned, squared = block(pattern)
    step = Barber(alpha=0.5, granularity=granularity, nm_exchange=nm_exchange)

    def turned(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T.contiguous().T

    straight = rebuilt(step, dense, pruned, squared, pattern)
    transposed = rebuilt(
        step,
        {name: turned(matrix) for name, matrix in dense.items()},
        {name: Pruned(turned(linear.mask_OI), turned(linear.weight_OI)) for name, linear in pruned.items()},
        {name: turned(matrix) for name, matrix in squared.items()},
        pattern,
    )
    for name, linear in straight.items():
        assert torch.equal(linear.pruned.mask_OI, transposed[name].pruned.mask_OI)
        assert linear.num_exchanged == transposed[name].num_exchanged


@pytest.mark.parametrize("granularity", ["input", "layer", "block"])
def test_cells_compete_in_output_rows_only(granularity: str) -> None:
    message = f"^granularity must be output with an N:M pattern \\(here 2:4\\), not {granularity}$"
    with pytest.raises(UserError, match=message):
        Barber(granularity=granularity).check(NM(2, 4))
    Barber(granularity=granularity).check(Unstructured(0.5))


# ---------------------------------------------------------------------------------------------------------------------
# With alpha chosen by the block


@dataclass
class ByDistance:
    """A block whose loss is how far its weights are from some, and that remembers what it was asked."""

    goal: Matrices
    num_samples: int = 8
    asked: list[Matrices] = field(default_factory=list)
    samples: set[tuple[int, int]] = field(default_factory=set)

    def distance(self, weights: Matrices) -> torch.Tensor:
        return sum(
            ((weights[name] - goal).double().square().sum() for name, goal in self.goal.items()), torch.zeros(())
        )

    def loss(self, weights: Mapping[str, torch.Tensor], samples: slice) -> torch.Tensor:
        self.samples.add((samples.start, samples.stop))
        self.asked.append(dict(weights))
        return self.distance(dict(weights))

    def gradient(self, weights: Any, samples: slice) -> Any:
        raise NotImplementedError


def weights_with(alphas: dict[str, float], granularity: str, pattern: Pattern) -> Matrices:
    """A block's weights where every linear has an alpha of its own."""
    dense, pruned, squared = block(pattern)
    return {
        name: rebuilt(Barber(alpha, granularity), dense, pruned, squared, pattern)[name].pruned.weight_OI  # type: ignore[arg-type]
        for name, alpha in alphas.items()
    }


def tried(trial: ByDistance, granularity: str, pattern: Pattern, num_samples: int = 8) -> Matrices:
    dense, pruned, squared = block(pattern)
    step = Barber("auto", granularity)  # type: ignore[arg-type]
    trial.num_samples = num_samples
    assert step.needs.trial and not Barber().needs.trial
    found = step.rebuild(state(dense, pattern, pruned, gradient_OI=squared, trial=trial))
    return {name: linear.pruned.weight_OI for name, linear in found.items()}


@pytest.mark.parametrize(
    ("pattern", "granularity"), [(Unstructured(0.5), each) for each in GRANULARITIES] + [(NM(2, 4), "output")], ids=str
)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_best_alpha_for_all_linears_is_found(pattern: Pattern, granularity: str, alpha: float) -> None:
    goal = weights_with(dict.fromkeys(SHAPES, alpha), granularity, pattern)
    found = tried(ByDistance(goal), granularity, pattern)
    for name in SHAPES:
        assert torch.equal(found[name], goal[name])


@pytest.mark.parametrize("granularity", ["output", "input", "layer"])
def test_then_a_linear_may_have_its_neighbour(granularity: str) -> None:
    """As a loop over the linears, in their order, would choose them."""
    pattern = Unstructured(0.5)
    differing = 0
    for wanted in itertools.product((0.1, 0.3, 1.0), (0.3, 1.0), (0.1, 0.3)):
        trial = ByDistance(weights_with(dict(zip(SHAPES, wanted, strict=True)), granularity, pattern))

        def loss(alphas: dict[str, float], trial: ByDistance = trial) -> float:
            return trial.distance(weights_with(alphas, granularity, pattern)).item()

        best = min((dict.fromkeys(SHAPES, alpha) for alpha in ALPHAS), key=loss)
        start = ALPHAS.index(best["gate"])
        for name in SHAPES:
            around = [ALPHAS[index] for index in (start, start - 1, start + 1) if 0 <= index < len(ALPHAS)]
            best = min((best | {name: alpha} for alpha in around), key=loss)
        found, expected = tried(trial, granularity, pattern), weights_with(best, granularity, pattern)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
        assert all(set(weights) == set(SHAPES) for weights in trial.asked)
        differing += len(set(best.values())) > 1
    assert differing


def test_a_block_as_one_group_has_one_alpha() -> None:
    goal = weights_with({"gate": 0.3, "up": 1.0, "down": 0.1}, "output", Unstructured(0.5))
    trial = ByDistance(goal)
    tried(trial, "block", Unstructured(0.5))
    assert len(trial.asked) == len(ALPHAS)


def test_where_all_are_equally_good_nothing_is_exchanged() -> None:
    dense, pruned, _ = block(Unstructured(0.5))
    found = tried(ByDistance({}), "output", Unstructured(0.5))
    for name in SHAPES:
        assert torch.equal(found[name], dense[name].masked_fill(pruned[name].mask_OI, 0))


@pytest.mark.parametrize(("num_samples", "first"), [(8, 6), (1, 0), (3, 2), (128, 96), (6, 5)])
def test_the_last_quarter_of_the_samples_decides(num_samples: int, first: int) -> None:
    trial = ByDistance({})
    tried(trial, "output", Unstructured(0.5), num_samples)
    assert trial.samples == {(first, num_samples)}
