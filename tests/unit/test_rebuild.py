"""Rebuilding the masks of a block: every granularity, metric and weight against loops over single weights."""

import itertools

import pytest
import torch

from barber.errors import UserError
from barber.metrics import Gradient, Metric, Weight, WeightGradient
from barber.patterns import NM, Pattern, Unstructured
from barber.pruners import Pruned
from barber.rebuild import Barber
from tests import oracles

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


def scores(rebuild: Barber, dense: Matrices, pruned: dict[str, Pruned], squared: Matrices) -> Matrices:
    """The scores of a block as the walk computes them."""
    return {
        name: rebuild.metric.score(
            rebuild.weight(dense[name], pruned[name]), squared[name] if rebuild.metric.needs_gradient else None
        )
        for name in dense
    }


@metrics
@pytest.mark.parametrize("retain", [False, True], ids=["dense weights", "reconstructed weights"])
@granularities
def test_masks_are_rebuilt_as_weight_by_weight(granularity: str, retain: bool, metric: Metric) -> None:
    pattern = Unstructured(0.5)
    dense, pruned, squared = block(pattern)
    initial = {name: linear.mask_OI for name, linear in pruned.items()}
    rebuild = Barber(alpha=0.5, granularity=granularity, retain_reconstruction=retain, metric=metric)
    rebuild.check(pattern)
    rebuilt = rebuild.exchange(scores(rebuild, dense, pruned, squared), initial, pattern)

    weight = {name: expected_weight(dense[name], pruned[name], retain) for name in dense}
    score = {name: expected_score(weight[name], squared[name], metric) for name in dense}
    expected, count = oracles.exchange_block(score, initial, granularity, 0.5)
    assert count > 0
    for name, linear in rebuilt.items():
        assert torch.equal(rebuild.weight(dense[name], pruned[name]), weight[name])
        assert torch.equal(linear.mask_OI, expected[name])
        assert linear.num_exchanged == int((initial[name] & ~expected[name]).sum())
    assert sum(linear.num_exchanged for linear in rebuilt.values()) == count


@metrics
@pytest.mark.parametrize("retain", [False, True], ids=["dense weights", "reconstructed weights"])
@pytest.mark.parametrize("nm_exchange", ["row", "cell"])
def test_masks_of_cells_are_rebuilt_as_weight_by_weight(nm_exchange: str, retain: bool, metric: Metric) -> None:
    pattern = NM(2, 4)
    dense, pruned, squared = block(pattern)
    initial = {name: linear.mask_OI for name, linear in pruned.items()}
    rebuild = Barber(alpha=0.5, retain_reconstruction=retain, nm_exchange=nm_exchange, metric=metric)
    rebuild.check(pattern)
    rebuilt = rebuild.exchange(scores(rebuild, dense, pruned, squared), initial, pattern)

    oracle = oracles.exchange_nm_by_row if nm_exchange == "row" else oracles.exchange_nm_in_cells
    total = 0
    for name, linear in rebuilt.items():
        score = expected_score(expected_weight(dense[name], pruned[name], retain), squared[name], metric)
        rows = zip(score.tolist(), initial[name].tolist(), strict=True)
        expected = [oracle(row, gone, 0.5, 4) for row, gone in rows]
        assert linear.mask_OI.tolist() == [mask for mask, _ in expected]
        assert linear.num_exchanged == sum(count for _, count in expected)
        total += linear.num_exchanged
    assert total > 0


def test_a_block_moves_sparsity_between_its_linears_and_counts_where_weights_grew() -> None:
    score = {"small": torch.tensor([[1.0, 2.0]]), "large": torch.tensor([[8.0, 9.0]])}
    pruned = {"small": torch.tensor([[False, False]]), "large": torch.tensor([[True, True]])}
    rebuilt = Barber(alpha=1.0, granularity="block").exchange(score, pruned, Unstructured(0.5))
    assert rebuilt["small"].mask_OI.tolist() == [[True, True]]
    assert rebuilt["large"].mask_OI.tolist() == [[False, False]]
    assert (rebuilt["small"].num_exchanged, rebuilt["large"].num_exchanged) == (0, 2)


@granularities
def test_a_rebuilt_group_has_as_many_pruned_weights_as_before(granularity: str) -> None:
    pattern = Unstructured(0.5)
    dense, pruned, squared = block(pattern)
    initial = {name: linear.mask_OI for name, linear in pruned.items()}
    rebuild = Barber(alpha=1.0, granularity=granularity)
    rebuilt = rebuild.exchange(scores(rebuild, dense, pruned, squared), initial, pattern)
    after = {name: linear.mask_OI for name, linear in rebuilt.items()}
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
    rebuild = Barber(alpha=0.5, granularity=granularity, nm_exchange=nm_exchange)
    initial = {name: linear.mask_OI for name, linear in pruned.items()}
    score = scores(rebuild, dense, pruned, squared)
    straight = rebuild.exchange(score, initial, pattern)
    transposed = rebuild.exchange(
        {name: matrix.T.contiguous().T for name, matrix in score.items()},
        {name: mask.T.contiguous().T for name, mask in initial.items()},
        pattern,
    )
    for name, linear in straight.items():
        assert torch.equal(linear.mask_OI, transposed[name].mask_OI)
        assert linear.num_exchanged == transposed[name].num_exchanged


@pytest.mark.parametrize("granularity", ["input", "layer", "block"])
def test_cells_compete_in_output_rows_only(granularity: str) -> None:
    message = f"^granularity must be output with an N:M pattern \\(here 2:4\\), not {granularity}$"
    with pytest.raises(UserError, match=message):
        Barber(granularity=granularity).check(NM(2, 4))
    Barber(granularity=granularity).check(Unstructured(0.5))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_share_of_pairs_outside_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match=f"^alpha must be from 0 to 1, not {alpha}$"):
        Barber(alpha=alpha)
