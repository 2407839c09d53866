"""A GGUF model that is cut into the pieces of several packages is put together before it is converted."""

import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from barber import UserError
from barber.model import gguf as models
from barber.model.gguf import Packaged
from tests import tiny
from tests.damage import flip
from tests.processes import launch

WHOLE = bytes(range(256)) * 8
CUTS = (0, 700, 1500, len(WHOLE))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three packages, a piece of the file in each, and an empty cache."""
    places = tmp_path / "site"
    for number, (start, end) in enumerate(pairwise(CUTS)):
        (places / f"piece_{number}" / "data").mkdir(parents=True)
        (places / f"piece_{number}" / "data" / f"model.part{number}").write_bytes(WHOLE[start:end])
    monkeypatch.syspath_prepend(str(places))
    monkeypatch.setenv("BARBER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def cut_up(pieces: range = range(3)) -> Packaged:
    parts = [f"piece_{number}/data/model.part{number}" for number in pieces]
    return Packaged("pieces", "model.gguf", "pip install pieces", parts)


def test_the_pieces_are_joined_in_their_order_and_converted_once(packages: Path) -> None:
    read: list[tuple[str, bytes]] = []

    def convert(pretrained_model_name_or_path: str, gguf_file: str, **_: Any) -> Any:
        read.append((gguf_file, (Path(pretrained_model_name_or_path) / gguf_file).read_bytes()))
        model = tiny.model("llama")
        model.config.quantization_config = {}
        return model

    source = cut_up()
    assert str(source) == "model"
    with (
        mock.patch.object(models.AutoModelForCausalLM, "from_pretrained", side_effect=convert),
        mock.patch.object(models.AutoTokenizer, "from_pretrained"),
    ):
        first, second = source._folder(), source._folder()
        weights = Path(first.path) / "model.safetensors"
        flip(weights)
        assert read == [("model.gguf", WHOLE)]  # within a process it is looked at once
        models._was_whole.cache_clear()
        again = weights.read_bytes(), source._folder() == first, weights.read_bytes()
    assert again[1] and again[0] != again[2]
    assert first == second
    assert Path(first.path).parent == packages
    assert sorted(path.suffix for path in Path(first.path).iterdir()) == [".json", ".json", ".json", ".safetensors"]


def convert_or_wait(places: str, log: str) -> str:
    """In a process of its own: a line in the log if the model had to be converted."""

    def convert(**_: Any) -> Any:
        with Path(log).open("a") as lines:
            lines.write("converted\n")
        time.sleep(0.3)
        model = tiny.model("llama")
        model.config.quantization_config = {}
        return model

    sys.path.insert(0, places)
    with (
        mock.patch.object(models.AutoModelForCausalLM, "from_pretrained", side_effect=convert),
        mock.patch.object(models.AutoTokenizer, "from_pretrained"),
    ):
        return str(cut_up().config().model_type)


def test_of_many_processes_one_converts_it_and_removes_what_a_killed_one_left(packages: Path, tmp_path: Path) -> None:
    left = packages / f".model-{len(WHOLE)}.abc.unfinished"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    places, log = str(tmp_path / "site"), str(tmp_path / "log")
    outcomes = launch(convert_or_wait, places, log, size=3, folder=tmp_path / "said")
    assert [outcome.result for outcome in outcomes] == ["llama"] * 3, outcomes
    assert Path(log).read_text() == "converted\n"
    assert [path.name for path in packages.iterdir()] == [f"model-{len(WHOLE)}"]


def test_a_conversion_that_fails_leaves_nothing_behind(packages: Path) -> None:
    with (
        mock.patch.object(models.AutoModelForCausalLM, "from_pretrained", side_effect=ValueError("no such kind")),
        pytest.raises(ValueError, match="no such kind"),
    ):
        cut_up()._folder()
    assert [*packages.iterdir()] == []


def test_a_piece_that_is_missing_comes_with_the_command_that_installs_it(packages: Path) -> None:
    with pytest.raises(UserError, match="needs the Python package piece_3, install it with: pip install pieces"):
        cut_up(range(4)).config()
    assert not packages.exists()
