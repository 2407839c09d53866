"""Every method in several processes: all end with the same bits, and a disagreement ends the run."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

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
    NumericsError,
    Random,
    Reconstruct,
    SparseGPT,
    SparseGPTUpdate,
    Swaps,
    Unstructured,
    UserError,
    Wanda,
    WandaPlus,
    allocate,
    prune,
)
from barber.methods.block import BlockState, Pruned
from barber.methods.pruners import Pruner
from barber.runtime.distributed import Ranks, joined
from barber.runtime.precision import Precision
from barber.walk.allocation import Allocation
from barber.walk.walk import Schedule
from tests import tiny
from tests.processes import Outcome, launch
from tests.pruning import prune as follow
from tests.pruning import state_of

NUM_SAMPLES = 5  # not as many for every process
HALF, CELLS = Unstructured(0.5), NM(2, 4)
SCHEDULES: tuple[Schedule, ...] = ("paper", "interleaved")
# Of a search's first round one process has no sample.
SEARCH = EvoPress(generations=2, offspring=4, survivors=[2, 1], tokens=[16, 80])

Options = dict[str, Any]
OPTIONS: list[Options] = [
    *({"pruner": pruner} for pruner in (Random(), RIA(), GBLM(), WandaPlus())),
    *(
        {"pruner": pruner, "pattern": pattern, "schedule": schedule, "rebuild": Barber(alpha=0.9)}
        for pruner, pattern, schedule in product((Magnitude(), Wanda(), SparseGPT()), (HALF, CELLS), SCHEDULES)
    ),
    {"rebuild": Barber(alpha=0.9), "schedule": "interleaved", "precision": Precision("bfloat16", "bfloat16")},
    *(
        {"rebuild": step}
        for step in (
            Barber(alpha=0.5, rounds=2),
            Barber(alpha="auto", granularity="block"),
            DSnoT(),
            [Swaps(follow=0.5), LeastSquares(steps=2, follow=1.0)],
            SparseGPTUpdate(),
            ADMM(),
            ALPS(iterations=6),
            Reconstruct(learning_rate=1e-3, follow=0.5),
        )
    ),
    *({"allocation": allocation} for allocation in (OWL(), ErrorCurves(levels=3), SEARCH)),
]
#: How many bits of the masks may differ from those of one process, by what is in the name of a case; otherwise none.
SHARES = {"ALPS": 0.1, "bfloat16": 0.02, "SparseGPT": 0.02, "Swaps": 0.01, "EvoPress": 0.01}
CASES = {" ".join(map(str, options.values())): options for options in OPTIONS}

Found = dict[str, torch.Tensor]


def found_of(case: str) -> Found:
    """Masks, losses and weights that a case leaves, in one process or in its share of several."""
    options = {"pattern": HALF, "pruner": Wanda()} | CASES[case]
    model, tokens_NL = tiny.model(), tiny.tokens(NUM_SAMPLES, seed=2)
    allocation: Allocation | None = options.pop("allocation", None)
    if allocation is not None:
        options["pattern"] = allocate(model, tokens_NL, allocation=allocation, pattern=HALF, batch_size=2)
    found: Found = {}

    def note(_: Any, block: Any) -> None:
        for linear in block.linears:
            found[f"initial mask of {linear.name}"] = linear.initial.mask_OI
            found[f"final mask of {linear.name}"] = linear.final.mask_OI
        if block.loss_before is not None:
            losses = torch.tensor([block.loss_before, block.loss_after], dtype=torch.float64)
            found[f"loss of {block.layer} {block.block}"] = losses

    follow(model, tokens_NL, batch_size=2, on_block=note, **options)
    return found | state_of(model)


def found_of_all() -> dict[str, Found]:
    with joined():
        return {case: found_of(case) for case in CASES}


@cache
def together(size: int, folder: Path) -> list[Outcome]:
    outcomes = launch(found_of_all, size=size, folder=folder / str(size), timeout=240)
    assert [(outcome.code, outcome.err) for outcome in outcomes] == [(0, "")] * size
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


alone = cache(found_of)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_every_method_leaves_the_same_bits_in_all_processes_and_nearly_those_of_one(
    size: int, case: str, folder: Path
) -> None:
    """Sums are added up in another order, so a score may change its last bits: few here are so near as to see it.

    One that is changes all that comes after it in SparseGPT's updates, and the scores of the block's other linears;
    what ALPS does next depends on how many weights have changed; in bfloat16 the last bits are large.
    """
    first, *others = [outcome.result[case] for outcome in together(size, folder)]
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(tensor, first[name]) for name, tensor in other.items())
    expected = alone(case)
    assert expected.keys() == first.keys()
    masks = [name for name in expected if "mask" in name]
    differing = sum(int((expected[name] != first[name]).sum()) for name in masks)
    share = next((share for name, share in SHARES.items() if name in case), 0)
    assert differing <= share * sum(expected[name].numel() for name in masks)
    for name, tensor in expected.items():
        if name.startswith("loss"):
            torch.testing.assert_close(first[name], tensor, rtol=2.5 * share if differing else 1e-4, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Disagreement


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
        prune(tiny.model(), tiny.tokens(NUM_SAMPLES), pattern=HALF, pruner=Disobedient())
    return str(caught.value)


def test_processes_that_disagree_end_the_run_and_name_the_layer(folder: Path) -> None:
    outcomes = launch(error_of_disagreement, size=3, folder=folder / "disobedient")
    expected = (
        "model.layers.1: the processes have come to different masks or weights, first in model.layers.1.mlp.up_proj; "
        "they need the same kind of device, the same number of threads and the same versions"
    )
    assert [outcome.result for outcome in outcomes] == [expected] * 3, outcomes
    prune(tiny.model(), tiny.tokens(), pattern=CELLS, pruner=Disobedient())  # alone nobody disagrees


CHANGES: list[list[tuple[int, int]]] = [[], [(3, 4), (4, 3)], [(0, 62), (62, 0)], [(9, 18), (18, 9)], [(1, 2)]]


def agreements() -> list[bool]:
    """Whether processes agree of which one has exchanged two weights, or has written one over another."""
    found = []
    with joined() as ranks:
        for places in CHANGES:
            weight_OI = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
            if ranks.rank:
                weight_OI.view(-1)[[a for a, _ in places]] = weight_OI.view(-1)[[b for _, b in places]]
            try:
                ranks.require_agreement("layer", {"linear": (weight_OI == 0, weight_OI)})
                found.append(True)
            except BarberError:
                found.append(False)
    return found


def test_the_place_of_a_weight_counts_too(folder: Path) -> None:
    outcomes = launch(agreements, size=2, folder=folder / "sums")
    assert [outcome.result for outcome in outcomes] == [[not places for places in CHANGES]] * 2, outcomes


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def errors_of_all_pruners(bad_sample: int) -> dict[str, str]:
    """The error of every pruner, for a token that is in one sample only and whose embedding is infinite."""
    errors = {}
    with joined():
        for pruner, schedule in product((Magnitude(), Wanda(), SparseGPT()), SCHEDULES):
            model, tokens_NL = tiny.model(), tiny.tokens(NUM_SAMPLES, vocabulary=tiny.VOCABULARY - 1)
            tokens_NL[bad_sample, 3] = tiny.VOCABULARY - 1
            model.model.embed_tokens.weight.data[-1] = torch.inf
            errors[f"{pruner}, {schedule}"] = refusal(
                NumericsError, model, tokens_NL, pruner, rebuild=Barber(), batch_size=2, schedule=schedule
            )
    return errors


def refusal(kind: type[BarberError], model: Any, tokens_NL: torch.Tensor, pruner: Pruner, **options: Any) -> str:
    """What is said instead of pruning; the model is left as it was."""
    dense = state_of(model)
    with pytest.raises(kind) as caught:
        prune(model, tokens_NL, pattern=HALF, pruner=pruner, **options)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("bad_sample", [0, NUM_SAMPLES - 1], ids=["of the first process", "of the last process"])
def test_a_sample_that_overflows_in_one_process_stops_all_with_the_same_error(bad_sample: int, folder: Path) -> None:
    outcomes = launch(errors_of_all_pruners, bad_sample, size=2, folder=folder / f"bad-{bad_sample}")
    assert [outcome.result for outcome in outcomes] == [errors_of_all_pruners(bad_sample)] * 2, outcomes


def error_with_too_few_samples() -> str:
    with joined():
        said = refusal(UserError, tiny.model(), tiny.tokens(2), Wanda())
    assert not torch.distributed.is_initialized()
    return said


def test_more_processes_than_samples_are_refused(folder: Path) -> None:
    outcomes = launch(error_with_too_few_samples, size=3, folder=folder / "few")
    message = "torchrun started 3 processes, but there are 2 calibration samples"
    assert [outcome.result for outcome in outcomes] == [message] * 3, outcomes
