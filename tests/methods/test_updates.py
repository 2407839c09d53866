"""Updates of the kept weights: each against a slow solution of its own problem, and what all have in common."""

from dataclasses import fields, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from barber.errors import NumericsError
from barber.methods.block import BlockState, Pruned
from barber.methods.patterns import NM, Pattern, Unstructured
from barber.methods.pruners import SparseGPT
from barber.methods.rebuild.base import Rebuild, Rebuilt
from barber.methods.statistics import Hessian
from barber.methods.updates import ADMM, ALPS, LeastSquares, Reconstruct, SparseGPTUpdate
from barber.runtime.tensors import Tensor
from tests.states import state

BY_HESSIAN = [LeastSquares(), LeastSquares(follow=1.0), SparseGPTUpdate(), ADMM(), ALPS(choose=False), ALPS()]
PATTERNS = [Unstructured(0.5), Unstructured(0.8), NM(2, 4), NM(1, 4)]
NUM_SAMPLES = 5

seeds = st.integers(0, 10_000)
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
by_hessian = pytest.mark.parametrize("update", BY_HESSIAN, ids=repr)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A linear pruned by magnitude: what it is fed now (T, I), and what the dense model feeds it."""

    def __init__(self, seed: int = 0, pattern: Pattern = PATTERNS[0], outputs: int = 6, inputs: int = 24) -> None:
        mixing_II = torch.eye(inputs) + 0.4 * randn(seed, inputs, inputs)
        self.pattern = pattern
        self.weight_OI = randn(seed + 1, outputs, inputs)
        self.x_TI = randn(seed + 2, NUM_SAMPLES * 16, inputs) @ mixing_II * (0.1 + randn(seed + 3, inputs).abs())
        self.dense_x_TI = self.x_TI + 0.3 * randn(seed + 4, *self.x_TI.shape)
        self.pruned = Pruned.masking(self.weight_OI, pattern.prune_rows(self.weight_OI.abs()))

    @property
    def hessian_II(self) -> Tensor:
        statistic = Hessian(NUM_SAMPLES)
        statistic.add(self.x_TI)
        return statistic.value()

    @property
    def state(self) -> BlockState:
        drift_II = (self.dense_x_TI - self.x_TI).T @ self.x_TI * (2 / NUM_SAMPLES)
        known = {"inputs": {"linear": self.hessian_II}, "drift": {"linear": drift_II}}
        return state({"linear": self.weight_OI}, self.pattern, {"linear": self.pruned}, **known)

    def updated(self, update: Rebuild) -> Rebuilt:
        return update.rebuild(self.state)["linear"]

    def error(self, weight_OI: Tensor, damping: float = 0.0) -> float:
        """The squared error of the outputs, with the damping's share of what the weights have moved."""
        lost_OI = weight_OI.double() - self.weight_OI.double()
        hessian_II = self.hessian_II.double()
        error = (lost_OI @ hessian_II * lost_OI).sum() + damping * hessian_II.diagonal().mean() * lost_OI.square().sum()
        return error.item()


# ---------------------------------------------------------------------------------------------------------------------
# What they have in common


@by_hessian
@patterns
def test_pruned_weights_stay_zero_and_the_others_come_closer(update: Rebuild, pattern: Pattern) -> None:
    case = Case(pattern=pattern)
    found = case.updated(update)
    assert not found.pruned.weight_OI[found.pruned.mask_OI].any()
    assert found.pruned.weight_OI.dtype == torch.float32
    assert found.score.isfinite().all()
    if update != LeastSquares(follow=1.0):  # whose aim is another one
        assert case.error(found.pruned.weight_OI) < 0.9 * case.error(case.pruned.weight_OI)
    if update != ALPS():
        assert torch.equal(found.pruned.mask_OI, case.pruned.mask_OI)
        assert found.num_exchanged == 0


@by_hessian
def test_linears_that_share_their_input_are_updated_as_if_alone(
    update: Rebuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what costs I^3 is done once for them."""
    case, other = Case(0, outputs=6), Case(50, outputs=3)
    other.x_TI, other.dense_x_TI = case.x_TI, case.dense_x_TI
    separate = Case(100)
    cases = {"q": case, "separate": separate, "k": other}
    alone = {name: each.updated(update) for name, each in cases.items()}

    calls = []
    for name in ("cholesky_ex", "eigh"):
        function = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *args, f=function, n=name, **kwargs: calls.append(n) or f(*args, **kwargs)
        )
    states = {name: each.state for name, each in cases.items()}
    together = update.rebuild(
        state(
            {name: each.weight_OI for name, each in cases.items()},
            Unstructured(0.5),
            {name: each.pruned for name, each in cases.items()},
            inputs={name: states["q" if name == "k" else name].inputs["linear"] for name in cases},
            drift={name: states["q" if name == "k" else name].drift["linear"] for name in cases},
        )
    )
    assert together.keys() == alone.keys()
    for name, found in together.items():
        assert torch.equal(found.pruned.weight_OI, alone[name].pruned.weight_OI)
        assert torch.equal(found.pruned.mask_OI, alone[name].pruned.mask_OI)
    per_input = {SparseGPTUpdate(): 2, ADMM(): 1, ALPS(): 1}.get(update, 0)  # type: ignore[call-overload]
    assert len(calls) == 2 * per_input


@by_hessian
def test_what_is_given_is_left_alone(update: Rebuild) -> None:
    case = Case()
    known = case.state
    given_tensors = [case.weight_OI, case.pruned.weight_OI, case.pruned.mask_OI]
    given_tensors += [known.inputs["linear"], known.drift["linear"]]
    before = [tensor.clone() for tensor in given_tensors]
    update.rebuild(known)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given_tensors, before, strict=True))


@by_hessian
def test_rows_without_kept_weights_and_inputs_that_are_never_there(update: Rebuild) -> None:
    case = Case(pattern=Unstructured(0.5))
    case.x_TI[:, [3, 11]] = 0
    case.weight_OI[4] = 0
    mask_OI = case.pruned.mask_OI.clone()
    mask_OI[1], mask_OI[2] = True, False
    case.pruned = Pruned.masking(case.weight_OI, mask_OI)
    found = case.updated(update).pruned
    assert found.weight_OI.isfinite().all()
    assert found.mask_OI.sum(dim=1).tolist() == mask_OI.sum(dim=1).tolist()
    assert not found.weight_OI[[1, 4]].any()
    if not update.needs.dense:  # a row that keeps all its weights has nothing to make up for
        seen_I = case.hessian_II.diagonal() > 0
        torch.testing.assert_close(found.weight_OI[2, seen_I], case.weight_OI[2, seen_I], rtol=1e-3, atol=1e-3)


@by_hessian
def test_a_transposed_weight_is_updated_like_any_other(update: Rebuild) -> None:
    """GPT-2 stores its weights that way."""
    case, turned = Case(), Case()
    turned.weight_OI = turned.weight_OI.T.contiguous().T
    turned.pruned = Pruned.masking(turned.weight_OI, turned.pruned.mask_OI.T.contiguous().T)
    straight, transposed = case.updated(update).pruned, turned.updated(update).pruned
    assert torch.equal(straight.mask_OI, transposed.mask_OI)
    torch.testing.assert_close(straight.weight_OI, transposed.weight_OI, rtol=1e-4, atol=1e-5)


def test_the_configs_spell_out_the_defaults() -> None:
    """A run without the group and one with it must not differ in a forgotten figure."""
    found = set()
    for file in (Path(__file__).parents[2] / "conf/update").glob("*.yaml"):
        config: Any = OmegaConf.to_container(OmegaConf.load(file))
        if "_target_" in config:
            module, name = config.pop("_target_").rsplit(".", 1)
            update = getattr(import_module(module), name)()
            assert config == {field.name: getattr(update, field.name) for field in fields(update)}
            found.add(name)
    assert found == {"ADMM", "ALPS", "LeastSquares", "Reconstruct", "SparseGPTUpdate"}


# ---------------------------------------------------------------------------------------------------------------------
# Least squares


def solution(case: Case, damping: float, follow: float) -> Tensor:
    """Row by row the least squares over the kept columns of the inputs themselves, in float64."""
    x_TI, dense_x_TI, weight_OI = case.x_TI.double(), case.dense_x_TI.double(), case.weight_OI.double()
    scale = (2 / NUM_SAMPLES) ** 0.5
    pull = (damping * case.hessian_II.double().diagonal().mean()).sqrt()
    target_OT = weight_OI @ ((1 - follow) * x_TI + follow * dense_x_TI).T
    result_OI = torch.zeros_like(weight_OI)
    for row, gone_I in enumerate(case.pruned.mask_OI):
        kept_I = ~gone_I
        left = torch.cat([scale * x_TI[:, kept_I], pull * torch.eye(int(kept_I.sum()), dtype=torch.float64)])
        right = torch.cat([scale * target_OT[row], pull * weight_OI[row, kept_I]])
        result_OI[row, kept_I] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return result_OI


@patterns
@pytest.mark.parametrize("follow", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("damping", [0.001, 0.1])
def test_least_squares_end_where_those_of_the_inputs_do(damping: float, follow: float, pattern: Pattern) -> None:
    case = Case(7, pattern)
    found = case.updated(LeastSquares(steps=60, damping=damping, follow=follow))
    torch.testing.assert_close(found.pruned.weight_OI.double(), solution(case, damping, follow), rtol=2e-3, atol=2e-3)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, pattern=st.sampled_from(PATTERNS))
def test_every_step_lowers_the_error_whatever_it_begins_with(seed: int, pattern: Pattern) -> None:
    case = Case(seed, pattern)
    moved_OI = case.weight_OI + randn(seed + 9, *case.weight_OI.shape)
    case.pruned = Pruned.masking(moved_OI, case.pruned.mask_OI)
    errors = [case.error(case.pruned.weight_OI, 0.01)]
    errors += [case.error(case.updated(LeastSquares(steps=steps)).pruned.weight_OI, 0.01) for steps in (1, 2, 4, 8, 16)]
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
    assert errors[1] < errors[0]


@settings(deadline=None, max_examples=30)
@given(seed=seeds, tokens=st.integers(1, 20))
def test_steps_beyond_the_solution_do_no_harm(seed: int, tokens: int) -> None:
    """Even without damping where there are fewer tokens than inputs, and no one solution."""
    case = Case(seed)
    case.x_TI, case.dense_x_TI = case.x_TI[:tokens], case.dense_x_TI[:tokens]
    short, long = (case.updated(LeastSquares(steps=steps, damping=0)).pruned.weight_OI for steps in (30, 500))
    before = case.error(case.pruned.weight_OI)
    assert case.error(long) <= case.error(short) + 1e-4 * before
    assert case.error(long) < before


@pytest.mark.parametrize("seed", [34, 148, 164, 215])
def test_directions_that_do_nothing_are_not_followed(seed: int) -> None:
    """One token of inputs of very unlike size, and no damping: rounding would send the weights anywhere."""
    case = Case(seed)
    case.x_TI = case.x_TI[:1] * 10 ** (2 * randn(seed + 77, 24))
    case.dense_x_TI = case.x_TI * (1 + 0.3 * randn(seed + 5, *case.x_TI.shape))
    target_TO = case.dense_x_TI.double() @ case.weight_OI.T.double()
    found = case.updated(LeastSquares(steps=500, damping=0, follow=1.0)).pruned
    before, after = (
        (case.x_TI.double() @ weight_OI.T.double() - target_TO).norm()
        for weight_OI in (case.pruned.weight_OI, found.weight_OI)
    )
    assert after < 0.5 * before


def test_least_squares_stay_at_the_solution() -> None:
    """They begin with the weights as they are, not with the dense ones."""
    case = Case()
    solved = case.updated(LeastSquares(steps=60)).pruned
    case.pruned = solved
    again = case.updated(LeastSquares(steps=1)).pruned
    torch.testing.assert_close(again.weight_OI, solved.weight_OI, rtol=1e-4, atol=1e-4)


def test_damping_holds_the_weights_to_the_dense_ones() -> None:
    case = Case()
    kept_OI = ~case.pruned.mask_OI
    moved = [
        (case.updated(LeastSquares(steps=60, damping=damping)).pruned.weight_OI - case.weight_OI)[kept_OI].norm().item()
        for damping in (0.001, 0.1, 10, 1e6)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-3 * moved[0]


@pytest.mark.parametrize(("method", "settings"), [(LeastSquares, {"steps": 60}), (ALPS, {})])
def test_following_the_dense_model_comes_closer_to_what_it_puts_out(method: Any, settings: dict[str, int]) -> None:
    case = Case()
    meant_TO, errors = case.dense_x_TI @ case.weight_OI.T, []
    for follow in (0.0, 0.5, 1.0):
        found = case.updated(method(**settings, follow=follow)).pruned
        assert torch.equal(found.mask_OI.sum(dim=1), case.pruned.mask_OI.sum(dim=1))
        errors.append((case.x_TI @ found.weight_OI.T - meant_TO).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.98 * errors[0]


def test_only_what_follows_the_dense_model_asks_for_it() -> None:
    assert all(method(follow=0.5).needs.dense for method in (LeastSquares, Reconstruct, ALPS))
    others = [LeastSquares(), SparseGPTUpdate(), ADMM(), ALPS(), Reconstruct()]
    assert not any(update.needs.dense for update in others)
    case = Case()
    found = LeastSquares().rebuild(replace(case.state, drift={}))["linear"]
    assert torch.equal(found.pruned.weight_OI, case.updated(LeastSquares()).pruned.weight_OI)


# ---------------------------------------------------------------------------------------------------------------------
# SparseGPT


@pytest.mark.parametrize("block_size", [8, 16, 128])
@patterns
def test_the_mask_of_sparsegpt_leads_to_the_weights_of_sparsegpt(pattern: Pattern, block_size: int) -> None:
    case = Case(pattern=pattern)
    case.x_TI[:, 5] = 0
    pruner = SparseGPT(block_size=block_size)
    expected = pruner.prune(case.state)["linear"]
    # Weights of the step before don't matter.
    case.pruned = Pruned.masking(case.weight_OI + 1, expected.mask_OI)
    found = case.updated(SparseGPTUpdate(block_size=block_size)).pruned
    assert torch.equal(found.mask_OI, expected.mask_OI)
    assert torch.equal(found.weight_OI, expected.weight_OI)


@patterns
def test_any_mask_is_updated_column_by_column(pattern: Pattern) -> None:
    case = Case(pattern=pattern)
    hessian = case.hessian_II.double().numpy()
    hessian += 0.05 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    expected = case.weight_OI.double().numpy().copy()
    for o, j in zip(*case.pruned.mask_OI.numpy().nonzero(), strict=True):  # row by row, from the left
        expected[o, j + 1 :] -= expected[o, j] / inverse[j, j] * inverse[j, j + 1 :]
        expected[o, j] = 0
    found = case.updated(SparseGPTUpdate(damping=0.05, block_size=8)).pruned.weight_OI
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_a_hessian_that_cannot_be_inverted_names_the_linear_and_the_setting() -> None:
    case = Case()
    case.x_TI = case.x_TI[:1].expand_as(case.x_TI)
    with pytest.raises(
        NumericsError, match=r"^linear: .*update\.sparsegpt\.damping=0; .* a larger update\.sparsegpt\.damping$"
    ):
        case.updated(SparseGPTUpdate(damping=0))


@pytest.mark.parametrize("update", [SparseGPTUpdate(), ADMM(), ALPS()], ids=repr)
def test_inputs_that_are_not_numbers_stop_the_run(update: Rebuild) -> None:
    case = Case()
    case.x_TI[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"^linear: the Hessian"):
        case.updated(update)


# ---------------------------------------------------------------------------------------------------------------------
# ADMM and ALPS


@patterns
@pytest.mark.parametrize(("iterations", "rho", "damping"), [(1, 1.0, 0.1), (20, 1.0, 0.1), (7, 0.3, 0.02)])
def test_admm_does_as_its_algorithm_says(pattern: Pattern, iterations: int, rho: float, damping: float) -> None:
    case = Case(pattern=pattern)
    gram = case.hessian_II.double().numpy()
    norm = np.sqrt(np.diag(gram))
    gram = gram / np.outer(norm, norm)
    gram += damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    expected = np.zeros(case.weight_OI.shape)
    for row, gone in enumerate(case.pruned.mask_OI.numpy()):
        dense = case.weight_OI[row].double().numpy() * norm
        w, u = dense, np.zeros(len(dense))
        for _ in range(iterations):
            z = np.where(gone, 0, w + u)
            u = u + (w - z)
            w = np.linalg.solve(gram + rho * np.eye(len(gram)), gram @ dense + rho * (z - u))
        expected[row] = np.where(gone, 0, w + u) / norm
    found = case.updated(ADMM(iterations, rho, damping)).pruned.weight_OI
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


@patterns
def test_admm_ends_at_the_least_squares_of_the_normalised_inputs(pattern: Pattern) -> None:
    """With inputs of norm 1 its ridge is the damping of least squares."""
    case = Case(pattern=pattern)
    norm_I = case.hessian_II.diagonal().sqrt()
    found = case.updated(ADMM(iterations=2000)).pruned.weight_OI
    case.x_TI, case.weight_OI = case.x_TI / norm_I, case.weight_OI * norm_I
    torch.testing.assert_close((found * norm_I).double(), solution(case, 0.1, 0), rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, pattern=st.sampled_from(PATTERNS))
def test_alps_finds_a_better_mask_with_as_many_weights_of_every_row_or_cell(seed: int, pattern: Pattern) -> None:
    """Better than that of the largest weights; as many as the mask at hand has, even where rows differ in it."""
    case = Case(seed, pattern)
    chosen, held, admm = (
        case.error(case.updated(update).pruned.weight_OI) for update in (ALPS(), ALPS(choose=False), ADMM())
    )
    assert chosen < held < case.error(case.pruned.weight_OI)
    assert chosen < admm
    if isinstance(pattern, Unstructured):
        case.pruned = Pruned.masking(case.weight_OI, pattern.prune_whole(case.weight_OI.abs()))
    found = case.updated(ALPS())
    before_OI, after_OI = case.pruned.mask_OI, found.pruned.mask_OI
    members = pattern.m if isinstance(pattern, NM) else before_OI.shape[1]
    assert torch.equal(*(mask.view(-1, members).sum(dim=1) for mask in (before_OI, after_OI)))
    assert found.num_exchanged == sum(
        was and not is_ for was, is_ in zip(before_OI.flatten().tolist(), after_OI.flatten().tolist(), strict=True)
    )
    assert found.num_exchanged > 0
    assert not found.pruned.weight_OI[after_OI].any()


def test_alps_with_its_mask_held_are_least_squares_from_the_dense_weights() -> None:
    case = Case()
    expected = case.updated(LeastSquares(steps=4)).pruned.weight_OI
    case.pruned = Pruned.masking(case.weight_OI + 1, case.pruned.mask_OI)
    assert torch.equal(case.updated(ALPS(choose=False, steps=4)).pruned.weight_OI, expected)


def test_alps_searches_beyond_where_it_begins() -> None:
    """A better mask than the one of the largest weights times norms of inputs, even if rho is too large at first."""
    case = Case(3, outputs=40)
    first = case.error(case.updated(ALPS(iterations=1, steps=60)).pruned.weight_OI)
    for rho in (0.001, 0.1, 1000):
        assert case.error(case.updated(ALPS(rho=rho, steps=60)).pruned.weight_OI) < 0.95 * first


def test_alps_ends_where_there_is_nothing_to_choose() -> None:
    case = Case(pattern=Unstructured(0))
    found = case.updated(ALPS())
    assert found.num_exchanged == 0
    torch.testing.assert_close(found.pruned.weight_OI, case.weight_OI, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


class TwoLinears:
    """A block y = W2 relu(W1 x), tried with other weights against its dense output."""

    def __init__(self, num_samples: int = 6) -> None:
        self.dense_OI = {"up": randn(0, 12, 8), "down": randn(1, 8, 12)}
        self.x_NLI = randn(2, num_samples, 10, 8)
        self.seen: list[slice] = []

    @property
    def num_samples(self) -> int:
        return len(self.x_NLI)

    def run(self, weight_OI: Any, samples: slice) -> Tensor:
        return (self.x_NLI[samples] @ weight_OI["up"].T).relu() @ weight_OI["down"].T

    def loss(self, weight_OI: Any, samples: slice) -> Tensor:
        return (self.run(weight_OI, samples) - self.run(self.dense_OI, samples)).square().mean().double()

    def gradient(self, weight_OI: Any, samples: slice, follow: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        assert not follow
        self.seen.append(samples)
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weight_OI.items()}
        loss = self.loss(leaves, samples)
        return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def pruned(self, pattern: Pattern) -> dict[str, Pruned]:
        return {name: Pruned.masking(w, pattern.prune_rows(w.abs())) for name, w in self.dense_OI.items()}


@patterns
def test_reconstruction_lowers_the_loss_of_the_block(pattern: Pattern) -> None:
    trial = TwoLinears()
    pruned = trial.pruned(pattern)
    before = {name: linear.weight_OI for name, linear in pruned.items()}
    update = Reconstruct(learning_rate=0.05, epochs=10)
    found = update.rebuild(state(trial.dense_OI, pattern, pruned, trial=trial))
    after = {name: linear.pruned.weight_OI for name, linear in found.items()}
    assert trial.loss(after, slice(0, 6)) < 0.85 * trial.loss(before, slice(0, 6))
    for name, linear in found.items():
        assert torch.equal(linear.pruned.mask_OI, pruned[name].mask_OI)
        assert linear.num_exchanged == 0
        assert not after[name][pruned[name].mask_OI].any()
        assert not torch.equal(after[name], before[name])
        assert not after[name].requires_grad
        # what is given is left alone
        assert torch.equal(before[name], trial.dense_OI[name].masked_fill(pruned[name].mask_OI, 0))


def test_reconstruction_goes_through_the_samples_in_their_order() -> None:
    trial = TwoLinears(num_samples=5)
    Reconstruct(batch_size=2, epochs=2).rebuild(
        state(trial.dense_OI, PATTERNS[0], trial.pruned(PATTERNS[0]), trial=trial)
    )
    assert trial.seen == [slice(0, 2), slice(2, 4), slice(4, 5)] * 2


def test_reconstruction_is_adam_with_a_rate_that_falls_to_zero() -> None:
    trial, pattern = TwoLinears(num_samples=4), Unstructured(0.5)
    pruned = trial.pruned(pattern)
    update = Reconstruct(learning_rate=0.02, batch_size=1, epochs=2)
    found = update.rebuild(state(trial.dense_OI, pattern, pruned, trial=trial))

    weight = {name: linear.weight_OI.double() for name, linear in pruned.items()}
    first = {name: torch.zeros_like(w) for name, w in weight.items()}
    second = {name: torch.zeros_like(w) for name, w in weight.items()}
    for step in range(8):
        _, gradient = trial.gradient({name: w.float() for name, w in weight.items()}, slice(step % 4, step % 4 + 1))
        for name, linear in pruned.items():
            g = gradient[name].double() * ~linear.mask_OI
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            size = first[name] / (1 - 0.9 ** (step + 1))
            root = (second[name] / (1 - 0.999 ** (step + 1))).sqrt()
            weight[name] = weight[name] - 0.02 * (1 - step / 8) * size / (root + 1e-8)
    for name, linear in found.items():
        torch.testing.assert_close(linear.pruned.weight_OI.double(), weight[name], rtol=1e-4, atol=1e-4)
