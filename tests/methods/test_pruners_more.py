"""Initial masks that need nothing, or gradients: random, Wanda++'s score and GBLM against loops."""

import dataclasses

import numpy as np
import pytest
import torch

from barber.errors import UserError
from barber.methods.block import Pruned
from barber.methods.patterns import NM, Pattern, Unstructured
from barber.methods.pruners import GBLM, RIA, Magnitude, Pruner, Random, SparseGPT, Wanda, WandaPlus
from tests import oracles
from tests.methods.test_pruners import linear, patterns
from tests.states import state

BY_GRADIENT = [WandaPlus(), GBLM()]
gradient_pruners = pytest.mark.parametrize("pruner", BY_GRADIENT, ids=lambda pruner: type(pruner).__name__)
both_patterns = pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)


def gradients(num_samples: int, size: float, shape: tuple[int, int] = (12, 24)) -> torch.Tensor:
    """The gradient of every sample's loss (N, O, I), of unlike sizes."""
    generator = torch.Generator().manual_seed(7)
    each_NOI = torch.randn(num_samples, *shape, generator=generator)
    return each_NOI * torch.rand(shape, generator=generator) * size


def prune(
    pruner: Pruner, weight_OI: torch.Tensor, x_NLI: torch.Tensor, g_NOI: torch.Tensor, pattern: Pattern
) -> Pruned:
    """Prune as the walk does: means over samples of the inputs' statistic and of the squared gradients."""
    assert pruner.statistic is not None
    statistic = pruner.statistic(len(x_NLI))
    statistic.add(x_NLI.flatten(0, 1))
    known = {"inputs": {"linear": statistic.value()}, "gradient_OI": {"linear": g_NOI.square().mean(dim=0)}}
    return pruner.prune(state({"linear": weight_OI}, pattern, **known))["linear"]


def masked(score: np.ndarray, sparsity: oracles.Sparsity) -> list[list[bool]]:
    """The lowest scores of every row, or of every cell, are pruned."""
    if sparsity.n is not None and sparsity.m is not None:
        return [oracles.lowest_of_cells(row.tolist(), sparsity.n, sparsity.m) for row in score]
    return [oracles.lowest(row.tolist(), int(len(row) * sparsity.ratio)) for row in score]


# ---------------------------------------------------------------------------------------------------------------------
# Random


def random_mask(seed: int, weight_OI: torch.Tensor, pattern: Pattern | None = None) -> torch.Tensor:
    return Random(seed).prune(state({"linear": weight_OI}, pattern or Unstructured(0.5)))["linear"].mask_OI


@both_patterns
def test_random_masks_follow_from_the_seed_and_the_weight_alone(pattern: Pattern) -> None:
    weight, _ = linear()
    torch.manual_seed(0)
    first = random_mask(3, weight, pattern)
    torch.manual_seed(1)
    random_mask(3, weight + 1, pattern)
    assert torch.equal(random_mask(3, weight.clone(), pattern), first)
    assert torch.equal(random_mask(3, weight.T.contiguous().T, pattern), first)  # as GPT-2 stores it


def test_random_masks_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    random_mask(3, linear()[0])
    assert torch.equal(torch.get_rng_state(), before)


@both_patterns
def test_every_linear_and_every_seed_has_another_random_mask(pattern: Pattern) -> None:
    weight, _ = linear(64, 64)
    almost = weight.clone()
    almost[5, 5] += 1e-6
    masks = [
        random_mask(0, weight, pattern),
        random_mask(1, weight, pattern),
        random_mask(0, almost, pattern),
        random_mask(0, weight.view(32, 128), pattern).view(64, 64),
    ]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            # Two that have nothing to do with each other agree in half of the 4096 weights, give or take 32.
            assert 0.45 < (mask == other).float().mean() < 0.55


@patterns
def test_random_masks_prune_any_weight_of_a_row_or_a_cell(pattern: Pattern, sparsity: oracles.Sparsity) -> None:
    weight, _ = linear(200, 40)
    pruned = Random().prune(state({"linear": weight}, pattern))["linear"]
    groups = pruned.mask_OI if sparsity.m is None else pruned.mask_OI.view(-1, sparsity.m)
    share = sparsity.ratio if sparsity.m is None else 1 - sparsity.n / sparsity.m
    assert (groups.sum(dim=1) == int(groups.shape[1] * share)).all()
    assert torch.equal(pruned.weight_OI, weight.masked_fill(pruned.mask_OI, 0))
    # Every place of a group alike, and large weights like small ones.
    assert ((groups.float().mean(dim=0) - share).abs() < 0.2).all()
    assert abs(pruned.mask_OI[weight.abs() > 1].float().mean() - share) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# With gradients


@patterns
def test_wanda_plus_adds_the_gradients_of_the_layer(pattern: Pattern, sparsity: oracles.Sparsity) -> None:
    weight, x = linear()
    g_NOI = gradients(len(x), size=0.05)
    pruned = prune(WandaPlus(), weight, x, g_NOI, pattern)
    norm_I = np.sqrt(np.mean([np.sum(x_LI.astype(np.float64) ** 2, axis=0) for x_LI in x.numpy()], axis=0))
    g_OI = np.sqrt(np.mean([g.astype(np.float64) ** 2 for g in g_NOI.numpy()], axis=0))
    score = np.abs(weight.numpy()) * (norm_I + 100 * g_OI)
    assert pruned.mask_OI.tolist() == masked(score, sparsity)
    assert torch.equal(pruned.weight_OI, weight.masked_fill(pruned.mask_OI, 0))
    without_gradient, without_inputs = (masked(np.abs(weight.numpy()) * part, sparsity) for part in (norm_I, g_OI))
    assert pruned.mask_OI.tolist() not in (without_gradient, without_inputs)


@patterns
def test_gblm_adds_the_root_of_the_squares_of_the_authors_128_samples(
    pattern: Pattern, sparsity: oracles.Sparsity
) -> None:
    weight, x = linear()
    x = x.repeat(26, 1, 1)[:128]
    g_NOI = gradients(128, size=0.005)
    pruned = prune(GBLM(), weight, x, g_NOI, pattern)
    norm_I = np.sqrt(np.mean([np.sum(x_LI.astype(np.float64) ** 2, axis=0) for x_LI in x.numpy()], axis=0))
    total_OI = np.zeros(weight.shape)
    for g_OI in g_NOI.numpy():
        total_OI += (100 * g_OI.astype(np.float64)) ** 2
    score = np.abs(weight.numpy()) * norm_I + np.abs(weight.numpy()) * np.sqrt(total_OI)
    assert pruned.mask_OI.tolist() == masked(score, sparsity)
    assert torch.equal(pruned.weight_OI, weight.masked_fill(pruned.mask_OI, 0))


@gradient_pruners
def test_samples_taken_twice_change_nothing(pruner: Pruner) -> None:
    weight, x = linear()
    g_NOI = gradients(len(x), size=0.01)
    once = prune(pruner, weight, x, g_NOI, Unstructured(0.5))
    twice = prune(pruner, weight, x.repeat(2, 1, 1), g_NOI.repeat(2, 1, 1), Unstructured(0.5))
    assert torch.equal(once.mask_OI, twice.mask_OI)


@gradient_pruners
@both_patterns
def test_without_gradients_in_the_score_it_is_that_of_wanda(pruner: WandaPlus | GBLM, pattern: Pattern) -> None:
    weight, x = linear()
    g_NOI = gradients(len(x), size=1)
    wanda = prune(Wanda(), weight, x, g_NOI, pattern)
    unscaled = dataclasses.replace(pruner, gradient_scale=0)
    assert torch.equal(prune(unscaled, weight, x, g_NOI, pattern).mask_OI, wanda.mask_OI)
    assert not torch.equal(prune(pruner, weight, x, g_NOI, pattern).mask_OI, wanda.mask_OI)


@gradient_pruners
@both_patterns
def test_a_dense_weight_is_left_alone_and_a_transposed_one_pruned_alike(pruner: Pruner, pattern: Pattern) -> None:
    weight, x = linear()
    before, g_NOI = weight.clone(), gradients(len(x), size=0.01)
    straight, transposed = (prune(pruner, w, x, g_NOI, pattern) for w in (weight, weight.T.contiguous().T))
    assert torch.equal(weight, before)
    assert torch.equal(straight.mask_OI, transposed.mask_OI)


@pytest.mark.parametrize("method", [WandaPlus, GBLM])
@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_a_scale_below_zero_is_refused(method: type[WandaPlus] | type[GBLM], scale: float) -> None:
    with pytest.raises(UserError, match=f"^gradient_scale must be at least 0, not {scale}$"):
        method(gradient_scale=scale)


def test_every_pruner_says_what_it_has_to_be_given() -> None:
    needs = {"layer": [WandaPlus()], "loss": [GBLM()], None: [Random(), Magnitude(), Wanda(), RIA(), SparseGPT()]}
    for gradient, methods in needs.items():
        assert all(method.gradient == gradient for method in methods)
    assert Random().statistic is None
