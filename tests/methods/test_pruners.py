"""Initial masks and what they leave of the weights, against loops that follow their papers."""

import dataclasses
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch

from barber.errors import NumericsError
from barber.methods.block import Pruned
from barber.methods.patterns import NM, Exactly, Granularity, Pattern, Unstructured
from barber.methods.pruners import GBLM, RIA, Magnitude, Pruner, Random, SparseGPT, Wanda, WandaPlus
from barber.methods.rebuild import Barber, DSnoT, Rebuild, Swaps
from barber.methods.statistics import InputStatistic
from barber.methods.updates import ALPS
from tests import oracles
from tests.states import state

PATTERNS = [
    pytest.param(Unstructured(0.5), oracles.Sparsity(0.5), id="0.5"),
    pytest.param(Unstructured(0.3), oracles.Sparsity(0.3), id="0.3"),
    pytest.param(NM(2, 4), oracles.Sparsity(n=2, m=4), id="2:4"),
    pytest.param(NM(4, 8), oracles.Sparsity(n=4, m=8), id="4:8"),
    pytest.param(NM(1, 4), oracles.Sparsity(n=1, m=4), id="1:4"),
]
patterns = pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
both_patterns = pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
BY_GRADIENT = [WandaPlus(), GBLM()]
gradient_pruners = pytest.mark.parametrize("pruner", BY_GRADIENT, ids=lambda pruner: type(pruner).__name__)


def linear(outputs: int = 12, inputs: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (O, I) and the inputs of five samples (N, L, I), correlated and of unlike size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mixing_II = torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs, generator=generator)
    x_NLI = torch.randn(5, 16, inputs, generator=generator) @ mixing_II
    return weight_OI, x_NLI * torch.rand(inputs, generator=generator).add(0.1)


def gradients(num_samples: int, size: float, shape: tuple[int, int] = (12, 24)) -> torch.Tensor:
    """The gradient of every sample's loss (N, O, I), of unlike sizes."""
    generator = torch.Generator().manual_seed(7)
    each_NOI = torch.randn(num_samples, *shape, generator=generator)
    return each_NOI * torch.rand(shape, generator=generator) * size


def statistic_of(kind: type[InputStatistic] | None, x_NLI: torch.Tensor) -> torch.Tensor:
    """The mean over samples of a statistic of the inputs; empty where none is asked for."""
    if kind is None:
        return torch.empty(0)
    statistic = kind(len(x_NLI))
    statistic.add(x_NLI.flatten(0, 1))
    return statistic.value()


def prune(
    pruner: Pruner, weight_OI: torch.Tensor, x_NLI: torch.Tensor, pattern: Pattern, g_NOI: torch.Tensor | None = None
) -> Pruned:
    """Prune as the walk does: means over samples of the inputs' statistic and of the squared gradients."""
    inputs = {"linear": statistic_of(pruner.statistic, x_NLI)}
    gradient_OI = {} if g_NOI is None else {"linear": g_NOI.square().mean(dim=0)}
    known = state({"linear": weight_OI}, pattern, inputs=inputs, gradient_OI=gradient_OI)
    return pruner.prune(known)["linear"]


Oracle = Callable[[np.ndarray, list[np.ndarray], oracles.Sparsity], np.ndarray]
MASKS: dict[str, tuple[Pruner, Oracle, Pruner]] = {
    "magnitude": (Magnitude(), lambda w, x, sparsity: oracles.magnitude(w, sparsity), Wanda()),
    "wanda": (Wanda(), oracles.wanda, Magnitude()),
    "ria": (RIA(compare="row"), lambda *case: oracles.ria(*case, whole=False), Wanda()),
    "ria, whole": (RIA(compare="matrix"), lambda *case: oracles.ria(*case, whole=True), Wanda()),
}


@patterns
@pytest.mark.parametrize(("pruner", "oracle", "another"), MASKS.values(), ids=MASKS)
def test_masks_are_those_of_the_papers_scores(
    pruner: Pruner, oracle: Oracle, another: Pruner, pattern: Pattern, sparsity: oracles.Sparsity
) -> None:
    weight, x = linear()
    pruned = prune(pruner, weight, x, pattern)
    assert pruned.mask_OI.tolist() == oracle(weight.numpy(), list(x.numpy()), sparsity).tolist()
    assert torch.equal(pruned.weight_OI, weight.masked_fill(pruned.mask_OI, 0))
    assert not torch.equal(pruned.mask_OI, prune(another, weight, x, pattern).mask_OI)


def test_ria_of_rows_and_columns_without_weights() -> None:
    weight, x = linear()
    weight[2], weight[:, 5] = 0, 0
    pruned = prune(RIA(), weight, x, Unstructured(0.5))
    assert (pruned.mask_OI.sum(dim=1) == 12).all() and pruned.mask_OI[:, 5].all()


@pytest.mark.parametrize("dead", [[], [3, 11]], ids=["", "inputs that are always zero"])
@pytest.mark.parametrize("settings", [{"block_size": size} for size in (8, 16, 128)] + [{"damping": 0.1}], ids=str)
@patterns
def test_sparsegpt_prunes_and_updates_column_by_column(
    pattern: Pattern, sparsity: oracles.Sparsity, settings: dict[str, float], dead: list[int]
) -> None:
    """24 inputs: three blocks, two of which the second is torn, and one that is never filled."""
    weight, x = linear()
    x[..., dead] = 0
    pruned = prune(SparseGPT(**settings), weight, x, pattern)
    mask, updated = oracles.sparsegpt(weight.numpy(), list(x.numpy()), sparsity, **settings)
    assert pruned.mask_OI.tolist() == mask.tolist()
    np.testing.assert_allclose(pruned.weight_OI.numpy(), updated, rtol=1e-4, atol=1e-4)
    assert not pruned.weight_OI[pruned.mask_OI].any() and not pruned.weight_OI[:, dead].any()


def test_sparsegpt_harms_the_outputs_less_than_its_mask_alone() -> None:
    """What the update of the kept weights is for."""
    weight, x = linear()
    pruned = prune(SparseGPT(), weight, x, Unstructured(0.5))
    updated, masked = ((x @ (weight - w).T).square().mean() for w in (pruned.weight_OI, weight * ~pruned.mask_OI))
    assert updated < 0.7 * masked


def test_sparsegpt_without_damping_names_the_setting_that_would_help() -> None:
    weight, x = linear()
    x = x[:1, :1].expand_as(x)  # the same token over and over
    with pytest.raises(
        NumericsError, match=r"not positive definite with pruner\.damping=0;.* a larger pruner\.damping"
    ):
        prune(SparseGPT(damping=0), weight, x, Unstructured(0.5))


@pytest.mark.parametrize(
    "pruner",
    [Magnitude(), Wanda(), RIA(), SparseGPT(), WandaPlus(), GBLM(), Random()],
    ids=lambda pruner: type(pruner).__name__,
)
@both_patterns
def test_a_dense_weight_is_left_alone_and_a_transposed_one_pruned_alike(pruner: Pruner, pattern: Pattern) -> None:
    """GPT-2 stores its weights that way."""
    weight, x = linear()
    before, g_NOI = weight.clone(), gradients(len(x), size=0.01)
    straight, transposed = (prune(pruner, w, x, pattern, g_NOI) for w in (weight, weight.T.contiguous().T))
    assert torch.equal(weight, before)
    assert torch.equal(straight.mask_OI, transposed.mask_OI)
    torch.testing.assert_close(straight.weight_OI, transposed.weight_OI)


#: Weights of few values, which tie: the float formats and grids that models come in.
FEW_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bfloat16": lambda w: w.bfloat16().float(),
    "4 bits": lambda w: (w * 7 / w.abs().max()).round(),
    "ternary": lambda w: w.round().clamp(-1, 1),
    "binary": torch.sign,
}
EXCHANGES: list[Rebuild] = [
    *(Barber(1.0, granularity) for granularity in get_args(Granularity)),
    Swaps(),
    DSnoT(),
    ALPS(),
]


@pytest.mark.parametrize("pattern", [Unstructured(0.3), NM(2, 4), Exactly(100)], ids=str)
@pytest.mark.parametrize("kind", FEW_VALUES)
def test_as_many_weights_go_as_are_to_however_many_tie(kind: str, pattern: Pattern) -> None:
    weight, x = linear()
    weight, g_NOI = FEW_VALUES[kind](weight), gradients(len(x), size=0.01)
    for pruner in [Random(), Wanda(), RIA(), *BY_GRADIENT, Magnitude(), RIA(compare="matrix"), SparseGPT(block_size=8)]:
        pruned = prune(pruner, weight, x, pattern, g_NOI)
        groups = pruned.mask_OI.view(-1, pattern.m) if isinstance(pattern, NM) else pruned.mask_OI
        if isinstance(pattern, NM):
            assert (groups.sum(dim=1) == 2).all()
        elif isinstance(pattern, Exactly):
            assert groups.sum() == 100
        elif isinstance(pruner, SparseGPT):
            assert (groups.view(12, 3, 8).sum(dim=(0, 2)) == int(96 * 0.3) + 1).all()
        elif pruner in (Magnitude(), RIA(compare="matrix")):
            assert groups.sum() == int(288 * 0.3) + 1
        else:
            assert (groups.sum(dim=1) == int(24 * 0.3)).all()
        if pruner == Magnitude() and not isinstance(pattern, NM):
            lowest = weight.abs().flatten().argsort(stable=True)[: groups.sum()]
            assert torch.equal(groups.flatten().nonzero().flatten(), lowest.sort().values)
        for step in EXCHANGES:
            if not (isinstance(pattern, NM) and isinstance(step, Barber) and step.granularity != "output"):
                inputs = {"linear": statistic_of(step.needs.statistic, x)}
                known = {"inputs": inputs, "gradient_OI": {"linear": g_NOI.square().mean(dim=0)}}
                after = step.rebuild(state({"linear": weight}, pattern, {"linear": pruned}, **known))["linear"]
                assert after.pruned.mask_OI.sum() == groups.sum()


# ---------------------------------------------------------------------------------------------------------------------
# Random


def random_mask(seed: int, weight_OI: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return Random(seed).prune(state({"linear": weight_OI}, pattern))["linear"].mask_OI


@both_patterns
def test_random_masks_follow_from_the_seed_and_the_weight_alone(pattern: Pattern) -> None:
    weight, _ = linear()
    before = torch.get_rng_state()
    first = random_mask(3, weight, pattern)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    random_mask(3, weight + 1, pattern)
    assert torch.equal(random_mask(3, weight.clone(), pattern), first)


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


def norms(x_NLI: torch.Tensor) -> np.ndarray:
    """The root of the mean over samples of the inputs' squares, (I,)."""
    return np.sqrt(np.mean([np.sum(x_LI.astype(np.float64) ** 2, axis=0) for x_LI in x_NLI.numpy()], axis=0))


@patterns
def test_wanda_plus_adds_the_gradients_of_the_layer(pattern: Pattern, sparsity: oracles.Sparsity) -> None:
    weight, x = linear()
    g_NOI = gradients(len(x), size=0.05)
    pruned = prune(WandaPlus(), weight, x, pattern, g_NOI)
    g_OI = np.sqrt(np.mean([g.astype(np.float64) ** 2 for g in g_NOI.numpy()], axis=0))
    parts = (norms(x) + 100 * g_OI, norms(x), g_OI)
    both, inputs, gradient = (oracles.lowest_of_rows(np.abs(weight.numpy()) * part, sparsity) for part in parts)
    assert pruned.mask_OI.tolist() == both.tolist()
    assert torch.equal(pruned.weight_OI, weight.masked_fill(pruned.mask_OI, 0))
    assert pruned.mask_OI.tolist() not in (inputs.tolist(), gradient.tolist())


@patterns
def test_gblm_adds_the_root_of_the_squares_of_the_authors_128_samples(
    pattern: Pattern, sparsity: oracles.Sparsity
) -> None:
    weight, x = linear()
    x = x.repeat(26, 1, 1)[:128]
    g_NOI = gradients(128, size=0.005)
    pruned = prune(GBLM(), weight, x, pattern, g_NOI)
    total_OI = np.zeros(weight.shape)
    for g_OI in g_NOI.numpy():
        total_OI += (100 * g_OI.astype(np.float64)) ** 2
    score = np.abs(weight.numpy()) * norms(x) + np.abs(weight.numpy()) * np.sqrt(total_OI)
    assert pruned.mask_OI.tolist() == oracles.lowest_of_rows(score, sparsity).tolist()
    assert torch.equal(pruned.weight_OI, weight.masked_fill(pruned.mask_OI, 0))


@gradient_pruners
def test_samples_taken_twice_change_nothing(pruner: Pruner) -> None:
    weight, x = linear()
    g_NOI = gradients(len(x), size=0.01)
    once = prune(pruner, weight, x, Unstructured(0.5), g_NOI)
    twice = prune(pruner, weight, x.repeat(2, 1, 1), Unstructured(0.5), g_NOI.repeat(2, 1, 1))
    assert torch.equal(once.mask_OI, twice.mask_OI)


@gradient_pruners
@both_patterns
def test_without_gradients_in_the_score_it_is_that_of_wanda(pruner: WandaPlus | GBLM, pattern: Pattern) -> None:
    weight, x = linear()
    g_NOI = gradients(len(x), size=1)
    wanda = prune(Wanda(), weight, x, pattern)
    unscaled = dataclasses.replace(pruner, gradient_scale=0)
    assert torch.equal(prune(unscaled, weight, x, pattern, g_NOI).mask_OI, wanda.mask_OI)
    assert not torch.equal(prune(pruner, weight, x, pattern, g_NOI).mask_OI, wanda.mask_OI)


def test_every_pruner_says_what_it_has_to_be_given() -> None:
    needs = {"layer": [WandaPlus()], "loss": [GBLM()], None: [Random(), Magnitude(), Wanda(), RIA(), SparseGPT()]}
    for gradient, methods in needs.items():
        assert all(method.gradient == gradient for method in methods)
    assert Random().statistic is None
