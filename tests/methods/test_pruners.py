"""Initial masks: magnitude, Wanda and SparseGPT against loops that follow their papers."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch

from barber.errors import NumericsError, UserError
from barber.methods.block import Pruned
from barber.methods.patterns import NM, Pattern, Unstructured
from barber.methods.pruners import RIA, Magnitude, Pruner, SparseGPT, Wanda
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


def linear(outputs: int = 12, inputs: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (O, I) and the inputs of five samples (N, L, I), correlated and of unlike size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mixing_II = torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs, generator=generator)
    x_NLI = torch.randn(5, 16, inputs, generator=generator) @ mixing_II
    return weight_OI, x_NLI * torch.rand(inputs, generator=generator).add(0.1)


def prune(pruner: Pruner, weight_OI: torch.Tensor, x_NLI: torch.Tensor, pattern: Pattern) -> Pruned:
    """Prune as the walk does: the statistic of all samples, then the linear."""
    inputs = {}
    if pruner.statistic is not None:
        statistic = pruner.statistic(len(x_NLI))
        statistic.add(x_NLI.flatten(0, 1))
        inputs["linear"] = statistic.value()
    return pruner.prune(state({"linear": weight_OI}, pattern, inputs=inputs))["linear"]


def samples(x_NLI: torch.Tensor) -> Sequence[np.ndarray]:
    return list(x_NLI.numpy())


@patterns
def test_magnitude_prunes_the_smallest_weights(pattern: Pattern, sparsity: oracles.Sparsity) -> None:
    weight, x = linear()
    pruned = prune(Magnitude(), weight, x, pattern)
    assert pruned.mask_OI.tolist() == oracles.magnitude(weight.numpy(), sparsity).tolist()
    assert torch.equal(pruned.weight_OI, weight.masked_fill(pruned.mask_OI, 0))


@patterns
def test_wanda_weighs_by_the_norm_of_the_inputs(pattern: Pattern, sparsity: oracles.Sparsity) -> None:
    weight, x = linear()
    pruned = prune(Wanda(), weight, x, pattern)
    assert pruned.mask_OI.tolist() == oracles.wanda(weight.numpy(), samples(x), sparsity).tolist()
    assert torch.equal(pruned.weight_OI, weight.masked_fill(pruned.mask_OI, 0))
    assert not torch.equal(pruned.mask_OI, prune(Magnitude(), weight, x, pattern).mask_OI)


@patterns
@pytest.mark.parametrize("compare", ["row", "matrix"])
def test_ria_weighs_by_what_else_a_row_and_a_column_have(
    compare: Literal["row", "matrix"], pattern: Pattern, sparsity: oracles.Sparsity
) -> None:
    weight, x = linear()
    pruned = prune(RIA(compare=compare), weight, x, pattern)
    expected = oracles.ria(weight.numpy(), samples(x), sparsity, whole=compare == "matrix")
    assert pruned.mask_OI.tolist() == expected.tolist()
    assert torch.equal(pruned.weight_OI, weight.masked_fill(pruned.mask_OI, 0))
    assert not torch.equal(pruned.mask_OI, prune(Wanda(), weight, x, pattern).mask_OI)


def test_ria_of_rows_and_columns_without_weights() -> None:
    weight, x = linear()
    weight[2], weight[:, 5] = 0, 0
    pruned = prune(RIA(), weight, x, Unstructured(0.5))
    assert (pruned.mask_OI.sum(dim=1) == 12).all() and pruned.mask_OI[:, 5].all()


def test_ria_with_an_exponent_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="exponent must be at least 0, not -1"):
        RIA(exponent=-1)


@pytest.mark.parametrize("block_size", [8, 16, 128])
@patterns
def test_sparsegpt_prunes_and_updates_column_by_column(
    pattern: Pattern, sparsity: oracles.Sparsity, block_size: int
) -> None:
    """24 inputs: three blocks, two of which the second is torn, and one that is never filled."""
    weight, x = linear()
    pruned = prune(SparseGPT(block_size=block_size), weight, x, pattern)
    mask, updated = oracles.sparsegpt(weight.numpy(), samples(x), sparsity, block_size=block_size)
    assert pruned.mask_OI.tolist() == mask.tolist()
    np.testing.assert_allclose(pruned.weight_OI.numpy(), updated, rtol=1e-4, atol=1e-4)
    assert not pruned.weight_OI[pruned.mask_OI].any()


@pytest.mark.parametrize("damping", [0.001, 0.1])
def test_sparsegpt_damps_the_diagonal_by_a_share_of_its_mean(damping: float) -> None:
    weight, x = linear()
    pruned = prune(SparseGPT(damping=damping), weight, x, Unstructured(0.5))
    mask, updated = oracles.sparsegpt(weight.numpy(), samples(x), oracles.Sparsity(0.5), damping=damping)
    assert pruned.mask_OI.tolist() == mask.tolist()
    np.testing.assert_allclose(pruned.weight_OI.numpy(), updated, rtol=1e-4, atol=1e-4)


@patterns
def test_sparsegpt_zeroes_the_weights_of_inputs_that_are_always_zero(
    pattern: Pattern, sparsity: oracles.Sparsity
) -> None:
    weight, x = linear()
    x[..., [3, 11]] = 0
    pruned = prune(SparseGPT(), weight, x, pattern)
    mask, updated = oracles.sparsegpt(weight.numpy(), samples(x), sparsity)
    assert not pruned.weight_OI[:, [3, 11]].any()
    assert pruned.mask_OI.tolist() == mask.tolist()
    np.testing.assert_allclose(pruned.weight_OI.numpy(), updated, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), RIA(), SparseGPT()], ids=lambda pruner: type(pruner).__name__)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_the_dense_weight_is_left_alone(pruner: Pruner, pattern: Pattern) -> None:
    weight, x = linear()
    before = weight.clone()
    prune(pruner, weight, x, pattern)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), RIA(), SparseGPT()], ids=lambda pruner: type(pruner).__name__)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_a_transposed_weight_is_pruned_like_any_other(pruner: Pruner, pattern: Pattern) -> None:
    """GPT-2 stores its weights that way."""
    weight, x = linear()
    straight, transposed = (prune(pruner, w, x, pattern) for w in (weight, weight.T.contiguous().T))
    assert torch.equal(straight.mask_OI, transposed.mask_OI)
    torch.testing.assert_close(straight.weight_OI, transposed.weight_OI)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -0.01}, "damping must be at least 0, not -0.01"),
        ({"damping": float("nan")}, "damping must be at least 0, not nan"),
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
    ],
)
def test_settings_of_sparsegpt_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        SparseGPT(**settings)
