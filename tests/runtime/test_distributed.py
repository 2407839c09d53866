"""Processes that share the calibration samples end with the same masks, those of one process alone."""

import math
import os
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from barber import (
    NM,
    Barber,
    LeastSquares,
    Magnitude,
    NumericsError,
    SparseGPT,
    Swaps,
    Unstructured,
    UserError,
    Wanda,
)
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.methods.statistics import Hessian, InputStatistic, MeanSquaredGradient, SecondMoment
from barber.model import gguf
from barber.model.sources import RandomModel
from barber.runtime.distributed import ALONE, Ranks, joined, local_device
from barber.runtime.precision import Precision
from barber.walk.walk import BlockResult, Schedule
from tests import tiny
from tests.processes import Outcome, launch
from tests.pruning import prune

NUM_SAMPLES = 5  # not as many for every process
ALPHA = 0.9
PRUNERS: dict[str, Pruner] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}
PATTERNS: dict[str, Pattern] = {"unstructured": Unstructured(0.5), "2:4": NM(2, 4)}
SCHEDULES: tuple[Schedule, ...] = ("paper", "interleaved")

Case = tuple[str, str, Schedule]
CASES: list[Case] = list(product(PRUNERS, PATTERNS, SCHEDULES))

sizes = pytest.mark.parametrize("size", [2, 3])
cases = pytest.mark.parametrize("case", CASES, ids="-".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


def results_of(
    method: str,
    pattern_name: str,
    schedule: Schedule,
    precision: Precision | None = None,
    rebuild: Rebuild | Sequence[Rebuild] = Barber(alpha=ALPHA),  # noqa: B008 (frozen)
) -> dict[str, torch.Tensor]:
    """Masks, weights and losses of a tiny llama, however many processes there are."""
    found: dict[str, torch.Tensor] = {}

    def on_block(_: Any, block: BlockResult | None) -> None:
        assert block is not None and block.loss_before is not None and block.loss_after is not None
        losses = torch.tensor([block.loss_before, block.loss_after], dtype=torch.float64)
        found[f"loss of {block.layer} {block.block}"] = losses
        for linear in block.linears:
            found[f"initial mask of {linear.name}"] = linear.initial.mask_OI
            found[f"final mask of {linear.name}"] = linear.final.mask_OI

    model = tiny.model("llama")
    prune(
        model,
        tiny.tokens(NUM_SAMPLES, seed=2),
        pattern=PATTERNS[pattern_name],
        pruner=PRUNERS[method],
        rebuild=rebuild,
        batch_size=2,
        schedule=schedule,
        precision=precision,
        on_block=on_block,
    )
    return found | {f"weight {name}": tensor for name, tensor in model.state_dict().items()}


def results_of_all_cases() -> dict[Case, dict[str, torch.Tensor]]:
    with joined():
        return {case: results_of(*case) for case in CASES}


@cache
def together(size: int, folder: Path) -> list[Outcome]:
    outcomes = launch(results_of_all_cases, size=size, folder=folder / str(size))
    assert [(outcome.code, outcome.err) for outcome in outcomes] == [(0, "")] * size
    return outcomes


@cases
@sizes
def test_all_processes_end_with_the_same_bits(size: int, case: Case, folder: Path) -> None:
    first, *others = [outcome.result[case] for outcome in together(size, folder)]
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(tensor, first[name]) for name, tensor in other.items())


@cases
@sizes
def test_they_are_those_of_one_process(size: int, case: Case, folder: Path) -> None:
    """Sums are added up in another order, so a score may change its last bits: no two here are so near as to see it.

    One that is changes all that comes after it in SparseGPT's updates, and the scores of the block's other linears.
    """
    alone, shared = results_of(*case), together(size, folder)[0].result[case]
    assert shared.keys() == alone.keys()
    masks = [name for name in alone if "mask" in name]
    differing = sum(int((alone[name] != shared[name]).sum()) for name in masks)
    assert differing <= (0.01 * sum(alone[name].numel() for name in masks) if case[0] == "sparsegpt" else 0)
    for name, tensor in alone.items():
        if name.startswith("loss"):
            torch.testing.assert_close(shared[name], tensor, rtol=0.05 if differing else 1e-5, atol=0)


@pytest.mark.parametrize("num_samples", [1, 5, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_sample_has_one_process_and_no_process_has_two_more_than_another(size: int, num_samples: int) -> None:
    shares = [Ranks(rank, size).share(num_samples) for rank in range(size)]
    assert [index for share in shares for index in range(num_samples)[share]] == list(range(num_samples))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert [Ranks(0, size).share(num_samples, rank) for rank in range(size)] == shares


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def errors_with_a_sample_that_overflows(bad_sample: int) -> dict[str, str]:
    """The error of every pruner, for a token that is in one sample only and whose embedding is infinite."""
    errors = {}
    with joined():
        for (name, pruner), schedule in product(PRUNERS.items(), SCHEDULES):
            model, tokens_NL = tiny.model("llama"), tiny.tokens(NUM_SAMPLES, vocabulary=tiny.VOCABULARY - 1)
            tokens_NL[bad_sample, 3] = tiny.VOCABULARY - 1
            model.model.embed_tokens.weight.data[-1] = torch.inf
            dense = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            with pytest.raises(NumericsError) as caught:
                prune(
                    model,
                    tokens_NL,
                    pattern=Unstructured(0.5),
                    pruner=pruner,
                    rebuild=Barber(),
                    batch_size=2,
                    schedule=schedule,
                )
            errors[f"{name}, {schedule}"] = str(caught.value)
            assert all(torch.equal(tensor, dense[key]) for key, tensor in model.state_dict().items())
    return errors


@pytest.mark.parametrize("bad_sample", [0, NUM_SAMPLES - 1], ids=["of the first process", "of the last process"])
def test_a_sample_that_overflows_in_one_process_stops_all_with_the_same_error(bad_sample: int, folder: Path) -> None:
    outcomes = launch(errors_with_a_sample_that_overflows, bad_sample, size=2, folder=folder / f"bad-{bad_sample}")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert outcomes[0].result == outcomes[1].result
    assert outcomes[0].result == errors_with_a_sample_that_overflows(bad_sample)


def error_with_too_few_samples() -> str:
    model = tiny.model("llama")
    dense = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with joined(), pytest.raises(UserError) as caught:
        prune(model, tiny.tokens(2), pattern=Unstructured(0.5), pruner=Wanda())
    assert not distributed.is_initialized()
    assert all(torch.equal(tensor, dense[key]) for key, tensor in model.state_dict().items())
    return str(caught.value)


def test_more_processes_than_samples_are_refused(folder: Path) -> None:
    outcomes = launch(error_with_too_few_samples, size=3, folder=folder / "few")
    message = "torchrun started 3 processes, but there are 2 calibration samples"
    assert [outcome.result for outcome in outcomes] == [message] * 3, outcomes


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def models_written(folder: Path) -> list[dict[str, torch.Tensor]]:
    """A model of a GGUF file and a random one, written by every process into a folder of its own."""
    made = tiny.model("llama", tie_word_embeddings=True)
    made.config.quantization_config = {}
    with joined() as ranks:
        with (
            mock.patch.object(gguf.AutoModelForCausalLM, "from_pretrained", return_value=made),
            mock.patch.object(gguf.AutoTokenizer, "from_pretrained"),
        ):
            gguf._convert([Path("model.gguf")], "model.gguf", folder / f"converted-{ranks.rank}")
        random = RandomModel("llama", {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1})
        random.folder(folder / f"random-{ranks.rank}")
    folders = [folder / f"{kind}-{ranks.rank}" for kind in ("converted", "random")]
    return [dict(AutoModelForCausalLM.from_pretrained(path).state_dict()) for path in folders]


def test_every_process_can_write_a_model_that_it_needs(folder: Path) -> None:
    """In a group `save_pretrained` writes in the first process only; an empty folder in the cache would stay."""
    outcomes = launch(models_written, folder / "models", size=2, folder=folder / "models")
    assert all(outcome.result for outcome in outcomes), outcomes
    for first, second in zip(*(outcome.result for outcome in outcomes), strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def values_asked_for_twice() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The value of every statistic, asked for twice in a row; every process has fed it another sample."""
    found = []
    with joined() as ranks:
        x_BLI = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(ranks.rank))
        statistics: list[InputStatistic] = [SecondMoment(4), Hessian(4)]
        for statistic in statistics:
            statistic.add(x_BLI.flatten(0, 1))
            found.append((statistic.value(ranks).clone(), statistic.value(ranks)))
        squared = MeanSquaredGradient(4)
        squared.add(x_BLI, x_BLI)
        found.append((squared.value(ranks).clone(), squared.value(ranks)))
    return found


def test_a_statistic_asked_for_twice_has_not_been_added_up_twice(folder: Path) -> None:
    outcomes = launch(values_asked_for_twice, size=2, folder=folder / "twice")
    for outcome in outcomes:
        assert all(torch.equal(first, second) for first, second in outcome.result), outcome


def what_is_broadcast() -> tuple[Ranks, bool, Any, torch.Tensor]:
    with joined() as ranks:
        heard = ranks.broadcast({"folder": Path("of rank 0")} if ranks.leads else None)
        return ranks, ranks.leads, heard, ranks.all_reduce_sum(torch.tensor([1.0, ranks.rank]))


def test_what_rank_0_knows_is_told_and_tensors_are_added_up(folder: Path) -> None:
    outcomes = launch(what_is_broadcast, size=3, folder=folder / "broadcast")
    for rank, outcome in enumerate(outcomes):
        ranks, leads, heard, total = outcome.result
        assert (ranks, leads, heard) == (Ranks(rank, 3), rank == 0, {"folder": Path("of rank 0")})
        assert total.tolist() == [3, 3]


def test_one_process_is_alone_and_asks_nobody() -> None:
    tensor = torch.ones(2)
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "1"}), joined() as ranks:
        assert not distributed.is_initialized()
    assert ranks == ALONE == Ranks.present()
    assert ranks.leads and ranks.share(7) == slice(0, 7) and ranks.broadcast("this") == "this"
    assert ranks.all_reduce_sum(tensor) is tensor and tensor.tolist() == [1, 1]


def test_a_process_takes_the_gpu_of_its_number_unless_another_was_named() -> None:
    with mock.patch.dict(os.environ, {"LOCAL_RANK": "5"}), mock.patch("torch.cuda.device_count", return_value=4):
        assert local_device(torch.device("cuda")) == torch.device("cuda", 1)
        assert local_device(torch.device("cuda", 3)) == torch.device("cuda", 3)
        assert local_device(torch.device("cpu")) == torch.device("cpu")
    with mock.patch.dict(os.environ):
        os.environ.pop("LOCAL_RANK", None)
        assert local_device(torch.device("cuda")) == torch.device("cuda")


bfloat16_results = partial(results_of, "wanda", "unstructured", "interleaved", Precision("bfloat16", "bfloat16"))


def bfloat16_results_of_a_process() -> dict[str, torch.Tensor]:
    with joined():
        return bfloat16_results()


def test_processes_share_samples_in_bfloat16_too(folder: Path) -> None:
    outcomes = launch(bfloat16_results_of_a_process, size=2, folder=folder / "bfloat16")
    first, second = (outcome.result for outcome in outcomes)
    assert first is not None, outcomes
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    alone = bfloat16_results()
    for name, losses in alone.items():
        if name.startswith("loss"):
            assert math.isclose(losses[1], first[name][1], rel_tol=0.02)


following_results = partial(
    results_of, "wanda", "unstructured", "paper", rebuild=[Swaps(follow=0.5), LeastSquares(steps=2, follow=1.0)]
)


def following_results_of_a_process() -> dict[str, torch.Tensor]:
    with joined():
        return following_results()


def test_processes_follow_the_dense_model_as_one_does(folder: Path) -> None:
    outcomes = launch(following_results_of_a_process, size=2, folder=folder / "following")
    first, second = (outcome.result for outcome in outcomes)
    assert first is not None, outcomes
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    alone = following_results()
    assert alone.keys() == first.keys()
    for name, tensor in alone.items():
        if "mask" in name:
            assert torch.equal(first[name], tensor), name
        else:
            torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-5)
