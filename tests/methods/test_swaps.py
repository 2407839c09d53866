"""Exact pair exchange: the error of every row falls with every exchange, and ends where no pair would lower it."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barber import NM, Magnitude, SparseGPT, Swaps, Unstructured, Wanda, prune
from barber.methods.block import BlockState, Pruned
from barber.methods.patterns import Pattern
from barber.methods.rebuild.swaps import exchange_exactly
from barber.model.decoder import Decoder
from tests import tiny
from tests.states import state

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def case(seed: int, outputs: int = 3, inputs: int = 8, tokens: int = 12, pattern: Pattern | None = None) -> Case:
    """A weight, G = X^T X of correlated inputs, and a mask by magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mixing_II = torch.eye(inputs) + 0.5 * torch.randn(inputs, inputs, generator=generator)
    x_TI = torch.randn(tokens, inputs, generator=generator) @ mixing_II
    return weight_OI, x_TI.T @ x_TI, (pattern or Unstructured(0.5)).prune_rows(weight_OI.abs())


def error_of(weight_OI: torch.Tensor, gram_II: torch.Tensor, mask_OI: torch.Tensor) -> torch.Tensor:
    """r^T G r of every row, in float64."""
    lost_OI = weight_OI.double().masked_fill(~mask_OI, 0)
    return ((lost_OI @ gram_II.double()) * lost_OI).sum(dim=1)


def pairs(row: list[bool], cell: int | None) -> list[tuple[int, int]]:
    """What may be exchanged: a pruned weight for a kept one."""
    places = range(len(row))
    return [
        (p, q) for p, q in product(places, places) if row[p] and not row[q] and (not cell or p // cell == q // cell)
    ]


def swapped(mask_OI: torch.Tensor, row: int, p: int, q: int) -> torch.Tensor:
    changed_OI = mask_OI.clone()
    changed_OI[row, p], changed_OI[row, q] = False, True
    return changed_OI


def best_error(weight_OI: torch.Tensor, gram_II: torch.Tensor, mask_OI: torch.Tensor, row: int, cell: Any) -> float:
    """The least error of a row that one exchange leads to, by trying all of them."""
    tried = [
        error_of(weight_OI, gram_II, swapped(mask_OI, row, p, q))[row].item()
        for p, q in pairs(mask_OI[row].tolist(), cell)
    ]
    return min(tried, default=float("inf"))


seeds = st.integers(0, 10_000)
cells = pytest.mark.parametrize("cell", [None, 4], ids=["row", "2:4"])


@cells
@settings(deadline=None)
@given(seed=seeds)
def test_in_the_end_no_exchange_is_left_that_gains(cell: int | None, seed: int) -> None:
    weight_OI, gram_II, mask_OI = case(seed, pattern=NM(2, 4) if cell else None)
    found_OI, _ = exchange_exactly(weight_OI, gram_II, mask_OI, candidates=8, rounds=100, cell=cell)
    after_O = error_of(weight_OI, gram_II, found_OI)
    for row in range(len(weight_OI)):
        assert best_error(weight_OI, gram_II, found_OI, row, cell) >= after_O[row] * (1 - 1e-4)


def test_rows_do_not_know_of_each_other() -> None:
    weight_OI, gram_II, mask_OI = case(1, outputs=6, inputs=16)
    together_OI, _ = exchange_exactly(weight_OI, gram_II, mask_OI, 4, 10)
    for row in range(6):
        alone_OI, _ = exchange_exactly(weight_OI[row : row + 1], gram_II, mask_OI[row : row + 1], 4, 10)
        assert torch.equal(alone_OI[0], together_OI[row])


@pytest.mark.parametrize("sparsity", [0, 0.06, 0.94])
def test_rows_with_fewer_weights_than_candidates(sparsity: float) -> None:
    weight_OI, gram_II, mask_OI = case(2, inputs=17, pattern=Unstructured(sparsity))
    found_OI, _ = exchange_exactly(weight_OI, gram_II, mask_OI, 16, 10)
    assert torch.equal(found_OI.sum(dim=1), mask_OI.sum(dim=1))
    assert (error_of(weight_OI, gram_II, found_OI) <= error_of(weight_OI, gram_II, mask_OI)).all()


def test_inputs_that_are_never_there_cost_nothing() -> None:
    weight_OI, gram_II, mask_OI = case(3)
    gram_II[:4], gram_II[:, :4] = 0, 0
    found_OI, _ = exchange_exactly(weight_OI, gram_II, mask_OI, 8, 50)
    assert found_OI[:, :4].all()  # they are pruned first: half of all, as many as there are to prune
    assert (error_of(weight_OI, gram_II, found_OI) == 0).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_the_method_gives_masks_of_the_pattern_and_counts_pairs(pattern: Pattern) -> None:
    weight_OI, gram_II, mask_OI = case(4, pattern=pattern)
    pruned = {"linear": Pruned.masking(weight_OI + 1, mask_OI)}
    found = Swaps().rebuild(state({"linear": weight_OI}, pattern, pruned, inputs={"linear": gram_II}))["linear"]
    after_OI = found.pruned.mask_OI
    assert found.num_exchanged == (mask_OI & ~after_OI).sum() or found.num_exchanged > 0
    assert torch.equal(found.pruned.weight_OI, weight_OI.masked_fill(after_OI, 0))  # the dense one, not what was given
    assert (error_of(weight_OI, gram_II, after_OI) < error_of(weight_OI, gram_II, mask_OI)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Following the dense model


def drifting(seed: int, follow: float, pattern: Pattern | None, inputs: int = 8) -> tuple[Case, torch.Tensor, Any]:
    """A case, its D, and || W (x + f (x' - x)) - (W o M) x ||^2 of every row from the inputs themselves, in float64."""
    weight_OI, _, mask_OI = case(seed, inputs=inputs, pattern=pattern)
    generator = torch.Generator().manual_seed(seed + 1)
    x_TI = torch.randn(24, weight_OI.shape[1], generator=generator, dtype=torch.float64)
    x_TI = x_TI + 0.5 * x_TI.roll(1, dims=1)
    dense_TI = x_TI + 0.7 * torch.randn(x_TI.shape, generator=generator) + 0.3 * x_TI.roll(1, dims=1)
    gram_II, drift_II = (x_TI.T @ x_TI).float(), ((dense_TI - x_TI).T @ x_TI).float()

    def loss(pruned_OI: torch.Tensor) -> torch.Tensor:
        aim_OT = weight_OI.double() @ (x_TI + follow * (dense_TI - x_TI)).T
        return (aim_OT - weight_OI.double().masked_fill(pruned_OI, 0) @ x_TI.T).square().sum(dim=1)

    return (weight_OI, gram_II, mask_OI), drift_II, loss


follows = pytest.mark.parametrize("follow", [0.0, 0.3, 1.0])


@follows
@cells
@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_the_first_exchange_is_the_best_of_all(cell: int | None, follow: float, seed: int) -> None:
    (weight_OI, gram_II, mask_OI), drift_II, loss = drifting(seed, follow, NM(2, 4) if cell else None)
    offset_OI = follow * weight_OI @ drift_II if follow else None
    found_OI, count_O = exchange_exactly(weight_OI, gram_II, mask_OI, 1 if cell else 8, 1, cell, offset_OI)
    before_O, after_O = loss(mask_OI), loss(found_OI)
    for row in range(len(weight_OI)):
        exchanges = pairs(mask_OI[row].tolist(), cell)
        best = min(loss(swapped(mask_OI, row, p, q))[row].item() for p, q in exchanges)
        if count_O[row]:  # one in a cell; in a row others may have followed in the same round
            assert after_O[row] <= best + 1e-4 * before_O[row]
        else:
            assert best >= (1 - 1e-4) * before_O[row]


@follows
@cells
@settings(deadline=None, max_examples=30)
@given(seed=seeds, candidates=st.integers(1, 20))
def test_no_round_raises_the_error_and_the_sparsity_stays(
    cell: int | None, follow: float, seed: int, candidates: int
) -> None:
    (weight_OI, gram_II, mask_OI), drift_II, loss = drifting(seed, follow, NM(2, 4) if cell else Unstructured(0.4), 16)
    offset_OI = follow * weight_OI @ drift_II if follow else None
    error_O, exchanges_O = loss(mask_OI), torch.zeros(len(mask_OI))
    for rounds in range(1, 6):
        found_OI, count_O = exchange_exactly(weight_OI, gram_II, mask_OI, candidates, rounds, cell, offset_OI)
        now_O = loss(found_OI)
        assert (now_O <= error_O * (1 + 1e-5)).all()
        assert (count_O >= exchanges_O).all() and (count_O <= rounds * candidates).all()
        assert torch.equal(found_OI.sum(dim=1), mask_OI.sum(dim=1))
        if cell:
            assert (found_OI.view(-1, 4).sum(dim=1) == 2).all()
        error_O, exchanges_O = now_O, count_O


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_the_method_follows_by_the_share_that_it_is_told(pattern: Pattern) -> None:
    (weight_OI, gram_II, mask_OI), drift_II, loss = drifting(5, 0.8, pattern)
    pruned = {"linear": Pruned.masking(weight_OI, mask_OI)}
    known = state({"linear": weight_OI}, pattern, pruned, inputs={"linear": gram_II}, drift={"linear": drift_II})
    error = {}
    for follow in (0.0, 0.8):
        step = Swaps(candidates=8, follow=follow)
        assert step.needs.dense == (follow > 0)
        found = step.rebuild(known)["linear"]
        error[follow] = loss(found.pruned.mask_OI).sum()
    assert error[0.8] < error[0.0]


def test_a_drift_that_is_no_number_is_found_out() -> None:
    """The score is what the run checks."""
    weight_OI, gram_II, mask_OI = case(6)
    drift_II = torch.full_like(gram_II, torch.nan)
    pruned = {"linear": Pruned.masking(weight_OI, mask_OI)}
    known = {"inputs": {"linear": gram_II}, "drift": {"linear": drift_II}}
    found = Swaps(follow=1).rebuild(state({"linear": weight_OI}, Unstructured(0.5), pruned, **known))["linear"]
    assert found.score.isnan().any()


# ---------------------------------------------------------------------------------------------------------------------
# On the walk


def weights_after(**options: Any) -> dict[str, torch.Tensor]:
    model = tiny.model(options.pop("family", "llama"))
    settings = {"pattern": Unstructured(0.5), "pruner": Wanda(), "batch_size": 2} | options
    report = prune(model, tiny.tokens(6), rebuild=settings.pop("rebuild", Swaps()), **settings)
    return {linear.name: linear.weight_OI.clone() for linear in Decoder(model).linears} | {
        "losses": torch.tensor([[block.loss_before or 0, block.loss_after or 0] for block in report.blocks])
    }


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT()], ids=lambda pruner: type(pruner).__name__)
@pytest.mark.parametrize("schedule", ["paper", "interleaved"])
def test_blocks_lose_less_and_kept_weights_stay_dense(pattern: Pattern, pruner: Any, schedule: str) -> None:
    dense = {linear.name: linear.weight_OI for linear in Decoder(tiny.model("llama")).linears}
    found = weights_after(pattern=pattern, pruner=pruner, schedule=schedule)
    losses = found.pop("losses")
    if not isinstance(pruner, SparseGPT):  # whose updated weights the dense ones replace
        assert losses[:, 1].sum() < losses[:, 0].sum()
    for name, weight_OI in found.items():
        assert torch.equal(weight_OI[weight_OI != 0], dense[name][weight_OI != 0])
        if isinstance(pruner, Wanda):
            assert ((weight_OI == 0).sum(dim=1) == weight_OI.shape[1] // 2).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_the_batch_size_changes_no_mask(family: str) -> None:
    first, *others = (weights_after(family=family, batch_size=batch_size) for batch_size in (2, 1, 4, 6))
    for other in others:
        differing = sum(int(((first[name] == 0) != (other[name] == 0)).sum()) for name in first)
        assert differing <= 2  # the sums over tokens are float32: a pair may tie


def test_linears_that_share_their_input_share_its_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    rebuild = Swaps.rebuild

    def note(self: Swaps, block: BlockState) -> Any:
        seen.append(dict(block.inputs))
        return rebuild(self, block)

    monkeypatch.setattr(Swaps, "rebuild", note)
    weights_after()
    # by themselves: q, k and v; o; gate and up; down
    assert [len(gram_II) for gram_II in seen[:4]] == [3, 1, 2, 1]
    assert all(len({id(gram_II) for gram_II in shared.values()}) == 1 for shared in seen)
