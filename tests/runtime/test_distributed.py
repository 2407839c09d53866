"""Processes that share the calibration samples: their shares, what they tell each other, and their devices."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from barber.methods.statistics import Hessian, InputStatistic, MeanSquaredGradient, SecondMoment
from barber.model import gguf
from barber.model.sources import RandomModel
from barber.runtime.distributed import ALONE, Ranks, joined, local_device
from tests import tiny
from tests.processes import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.mark.parametrize("num_samples", [1, 5, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_sample_has_one_process_and_no_process_has_two_more_than_another(size: int, num_samples: int) -> None:
    shares = [Ranks(rank, size).share(num_samples) for rank in range(size)]
    assert [index for share in shares for index in range(num_samples)[share]] == list(range(num_samples))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert [Ranks(0, size).share(num_samples, rank) for rank in range(size)] == shares


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
