"""What models are called that are given by a place."""

from pathlib import Path

import pytest

from barber.model.names import called, hub_id, own_name

SNAPSHOT = "/cache/hub/models--ORG--My-Model/snapshots/0123abc"


@pytest.mark.parametrize(
    ("path", "name", "repository"),
    [
        ("/x/My-Model", "My-Model", None),
        ("/x/My-Model/", "My-Model", None),
        ("ORG/My-Model", "My-Model", "ORG/My-Model"),
        ("gpt2", "gpt2", "gpt2"),
        (SNAPSHOT, "My-Model", "ORG/My-Model"),
        (f"{SNAPSHOT}/", "My-Model", "ORG/My-Model"),
        ("./My-Model", "My-Model", None),
        ("~/My Model", "My Model", None),
    ],
)
def test_a_path_has_the_name_of_its_folder_or_repository(path: str, name: str, repository: str | None) -> None:
    assert (own_name(path), hub_id(path)) == (name, repository)


def test_the_working_folder_and_those_above_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Mine" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "Mine" / "inner")
    assert (own_name("."), own_name(".."), own_name("../")) == ("inner", "Mine", "Mine")
    monkeypatch.chdir(tmp_path)
    assert hub_id("Mine/inner") is None  # as transformers has it, a folder comes first


def test_a_choice_that_names_a_model_is_its_name() -> None:
    assert called("llama2-7b", {"path": "meta-llama/Llama-2-7b-hf"}) == "llama2-7b"
    assert called("hub", {"path": "ORG/NAME"}) == called("local", {"path": "/x/NAME"}) == "NAME"
    assert called("local", {}) == called("local", None) == "local"
