"""Every method in several processes: all end with the same bits, and a disagreement ends the run."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch

from barber import (
    ADMM,
    ALPS,
    GBLM,
    NM,
    OWL,
    RIA,
    Barber,
    BarberError,
    DSnoT,
    ErrorCurves,
    EvoPress,
    LeastSquares,
    Magnitude,
    Random,
    Reconstruct,
    SparseGPT,
    SparseGPTUpdate,
    Swaps,
    Unstructured,
    Wanda,
    WandaPlus,
    allocate,
    prune,
)
from barber.methods.block import BlockState, Pruned
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.runtime.distributed import Ranks, joined
from barber.walk.allocation import Allocation
from tests import tiny
from tests.processes import Outcome, launch

NUM_SAMPLES = 5  # not as many for every process
HALF = Unstructured(0.5)
PRUNERS: list[Pruner] = [Random(), Magnitude(), Wanda(), RIA(), SparseGPT(), GBLM(), WandaPlus()]
STEPS: list[Rebuild] = [
    Barber(alpha=0.5, rounds=2),
    Barber(alpha="auto", granularity="block"),
    DSnoT(),
    Swaps(follow=0.5),
    LeastSquares(),
    SparseGPTUpdate(),
    ADMM(),
    ALPS(iterations=6),
    Reconstruct(learning_rate=1e-3, follow=0.5),
]
ALLOCATIONS: list[Allocation] = [
    OWL(),
    ErrorCurves(levels=3),
    EvoPress(generations=2, offspring=4, survivors=[1], tokens=[80]),
]
CASES = [*map(repr, PRUNERS), *map(repr, STEPS), *map(repr, ALLOCATIONS)]

Weights = dict[str, torch.Tensor]


def weights_after(case: str) -> Weights:
    """The weights that a case leaves, in one process or in its share of several."""
    model, tokens_NL = tiny.model("llama"), tiny.tokens(NUM_SAMPLES, seed=2)
    pattern: Unstructured | Mapping[str, object] = HALF
    pruner: Pruner = next((one for one in PRUNERS if repr(one) == case), Wanda())
    steps = [one for one in STEPS if repr(one) == case]
    for allocation in ALLOCATIONS:
        if repr(allocation) == case:
            pattern = allocate(model, tokens_NL, allocation=allocation, pattern=HALF, batch_size=2)
    prune(model, tokens_NL, pattern=pattern, pruner=pruner, rebuild=steps, batch_size=2)  # type: ignore[arg-type]
    return dict(model.state_dict())


def weights_after_all() -> dict[str, Weights]:
    with joined():
        return {case: weights_after(case) for case in CASES}


@cache
def together(size: int, folder: Path) -> list[Outcome]:
    outcomes = launch(weights_after_all, size=size, folder=folder / str(size), timeout=240)
    assert [(outcome.code, outcome.err) for outcome in outcomes] == [(0, "")] * size
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_every_method_leaves_the_same_bits_in_all_processes_and_nearly_those_of_one(
    size: int, case: str, folder: Path
) -> None:
    first, *others = [outcome.result[case] for outcome in together(size, folder)]
    for other in others:
        assert all(torch.equal(tensor, first[name]) for name, tensor in other.items())
    alone = weights_after(case)
    zeros = sum(int(((alone[name] == 0) != (first[name] == 0)).sum()) for name in alone)
    # Sums have other last bits, so ties may turn; what ALPS does next depends on how many weights have changed.
    share = 0.1 if case.startswith("ALPS") else 0.02
    assert zeros <= share * sum(tensor.numel() for tensor in alone.values())


class Disobedient(Wanda):
    """In the last process one weight more stays, in the second layer."""

    def prune(self, block: BlockState) -> dict[str, Pruned]:
        pruned = super().prune(block)
        name = "model.layers.1.mlp.up_proj"
        if Ranks.present().rank == Ranks.present().size - 1 and name in pruned:
            mask_OI = pruned[name].mask_OI.clone()
            mask_OI[0, mask_OI[0].nonzero()[0]] = False
            pruned[name] = Pruned.masking(block.dense_OI[name], mask_OI)
        return pruned


def error_of_disagreement() -> str:
    with joined(), pytest.raises(BarberError) as caught:
        prune(tiny.model("llama"), tiny.tokens(NUM_SAMPLES), pattern=HALF, pruner=Disobedient())
    return str(caught.value)


def test_processes_that_disagree_end_the_run_and_name_the_layer(folder: Path) -> None:
    outcomes = launch(error_of_disagreement, size=3, folder=folder / "disobedient")
    expected = (
        "model.layers.1: the processes have come to different masks or weights, first in model.layers.1.mlp.up_proj; "
        "they need the same kind of device, the same number of threads and the same versions"
    )
    assert [outcome.result for outcome in outcomes] == [expected] * 3, outcomes
    prune(tiny.model("llama"), tiny.tokens(), pattern=NM(2, 4), pruner=Disobedient())  # alone nobody disagrees


def sums_of(*changes: tuple[int, int]) -> bool:
    """Whether processes agree that have exchanged two numbers, or have turned a bit."""
    with joined() as ranks:
        weight_OI = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
        if ranks.rank:
            places = list(changes)
            weight_OI.view(-1)[[a for a, _ in places]] = weight_OI.view(-1)[[b for _, b in places]]
        try:
            ranks.require_agreement("layer", {"linear": (weight_OI == 0, weight_OI)})
        except BarberError:
            return False
        return True


@pytest.mark.parametrize("changes", [(), ((3, 4), (4, 3)), ((0, 62), (62, 0)), ((9, 18), (18, 9)), ((1, 2),)])
def test_the_place_of_a_weight_counts_too(changes: tuple[tuple[int, int], ...], folder: Path) -> None:
    outcomes = launch(sums_of, *changes, size=2, folder=folder / f"sums-{len(changes)}-{sum(map(sum, changes))}")
    assert [outcome.result for outcome in outcomes] == [not changes] * 2, outcomes
