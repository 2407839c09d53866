"""A run claims its folder for itself, and goes on with what an interrupted one with the same settings had to leave."""

import errno
import json
import os
import re
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from barber import UserError
from barber.model.checkpoint import Checkpoint
from barber.run.claim import FOLDER, TakenError, begin, owned, siblings
from tests.processes import launch

FACTS: dict[str, Any] = {"rebuild": {"alpha": 0.1, "rows": (1, 2)}, "pattern": {"n": 2, "m": 4}, "batch_size": None}


def interrupted(folder: Path, facts: dict[str, Any] = FACTS, layers: int = 1) -> Path:
    """The folder of a run that was killed."""
    folder.mkdir(exist_ok=True)
    assert begin(folder, facts, may_resume=False) is None
    for index in range(layers):
        (folder / FOLDER / f"layer-{index:05d}.json").write_text("[]")
    return folder


def settings_in(folder: Path) -> Any:
    return json.loads((folder / FOLDER / "settings.json").read_text())["content"]


def test_a_fresh_folder_gets_the_settings(tmp_path: Path) -> None:
    source = begin(tmp_path, FACTS, may_resume=True)
    assert source is None
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["settings.json"]


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    source = begin(tmp_path / "run", FACTS, may_resume=True)
    assert source == tmp_path / "run"


@pytest.mark.parametrize("may_resume", [True, False])
@pytest.mark.parametrize("facts", [FACTS, FACTS | {"batch_size": 4}], ids=["the same", "other settings"])
def test_a_run_that_was_killed_in_its_first_layer_is_in_nobodys_way(
    facts: dict[str, Any], may_resume: bool, tmp_path: Path
) -> None:
    interrupted(tmp_path / "run", layers=0)
    source = begin(tmp_path / "run", facts, may_resume)
    assert source is None
    assert settings_in(tmp_path / "run") == json.loads(json.dumps(facts))


def test_other_settings_are_refused_by_key_with_both_values_and_nothing_is_lost(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / FOLDER).iterdir()}
    other = FACTS | {"rebuild": {"alpha": 0.2, "rows": (1, 2)}, "batch_size": 4}
    with pytest.raises(UserError) as refusal:
        begin(tmp_path / "run", other, may_resume=True)
    sentence = str(refusal.value)
    assert "(batch_size: None there, 4 here, rebuild.alpha: 0.1 there, 0.2 here)" in sentence
    assert sentence.startswith("hydra.run.dir holds an unfinished run with other settings")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / FOLDER).iterdir()} == before
    source = begin(tmp_path / "run", FACTS, may_resume=True)
    assert source == tmp_path / "run"


@pytest.mark.parametrize("facts", [{}, {"pattern": None}, {"pattern": 3}, {"pattern": {"n": 2, "m": 4, "k": 1}}])
def test_settings_that_one_of_them_lacks_are_told_too(facts: dict[str, Any], tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    rest = {key: value for key, value in FACTS.items() if key != "pattern"}
    with pytest.raises(UserError, match=r"\(pattern(\.[nmk])?: "):
        begin(tmp_path / "run", rest | facts, may_resume=True)


def test_without_leave_to_resume_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    with pytest.raises(UserError, match="holds an unfinished run; resume=auto goes on with it"):
        begin(tmp_path / "run", FACTS, may_resume=False)


def test_a_folder_has_one_owner_from_the_first_write_to_the_last(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    with owned(run):
        assert run.is_dir()
        for _ in range(2):  # a refusal leaves the claim as it is
            with pytest.raises(
                TakenError, match=f"is the folder of a run that is still going on, {run}; choose another$"
            ):
                owned(run).__enter__()
    assert list(run.iterdir()) == []
    with owned(run):
        pass


def test_where_a_lock_may_outlive_its_holder_it_is_said_what_to_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with owned(tmp_path), pytest.raises(TakenError, match=r"choose another, or delete .*/\.lock\.soft where none is$"):
        owned(tmp_path).__enter__()
    with owned(tmp_path):
        pass


@pytest.mark.parametrize("name", ["record.json", "layers.jsonl", "loss.png", "run.log", "masks.safetensors", ".hydra"])
def test_what_would_be_written_over_or_through_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    for make in (lambda path: path.symlink_to("elsewhere"), Path.mkdir if name != ".hydra" else Path.touch):
        make(tmp_path / name)  # type: ignore[operator]
        with pytest.raises(UserError, match=rf"^hydra.run.dir must hold a (file|folder) .* as {re.escape(name)}, not"):
            owned(tmp_path).__enter__()
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_runs_of_the_same_second_have_folders_of_their_own_that_take_over_from_each_other(tmp_path: Path) -> None:
    names = [path.name for path in islice(siblings(tmp_path / FIRST), 3)]
    assert names == [FIRST, *(f"2026-01-01_10-00-00-{number}_llama_wanda" for number in (2, 3))]
    interrupted(tmp_path / names[1])
    assert begun(tmp_path / SECOND) == tmp_path / names[1]


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_settings_that_cannot_be_read_are_those_of_no_run(content: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "run", layers=0)
    (tmp_path / "run" / FOLDER / "settings.json").write_text(content)
    source = begin(tmp_path / "run", FACTS, may_resume=True)
    assert source is None
    assert settings_in(tmp_path / "run") == json.loads(json.dumps(FACTS))


def test_layers_whose_settings_are_unknown_are_not_taken_over(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", layers=2)
    (tmp_path / "run" / FOLDER / "settings.json").unlink()
    source = begin(tmp_path / "run", FACTS, may_resume=True)
    assert source is None
    assert Checkpoint(tmp_path / "run" / FOLDER, 3).num_finished == 0


FIRST, SECOND, THIRD, FOURTH = (f"2026-01-0{day}_10-00-00_llama_wanda" for day in (1, 2, 3, 4))


def begun(folder: Path, facts: dict[str, Any] = FACTS, may_resume: bool = True) -> Path | None:
    """As a run does it, whose folder is there already."""
    folder.mkdir(exist_ok=True)
    return begin(folder, facts, may_resume)


def test_a_folder_of_another_time_takes_over_the_latest_of_the_same_name(tmp_path: Path) -> None:
    for name in (FIRST, SECOND):
        interrupted(tmp_path / name)
    source = begun(tmp_path / THIRD)
    assert source == tmp_path / SECOND
    assert not (tmp_path / SECOND / FOLDER).exists()
    assert (tmp_path / FIRST / FOLDER / "layer-00000.json").exists()
    assert Checkpoint(tmp_path / THIRD / FOLDER, 2).num_finished == 1


def test_it_passes_over_other_settings_and_runs_that_still_go_on_and_those_without_a_layer(tmp_path: Path) -> None:
    interrupted(tmp_path / FIRST)
    interrupted(tmp_path / SECOND, FACTS | {"batch_size": 7})
    interrupted(tmp_path / THIRD, layers=0)
    with owned(interrupted(tmp_path / FOURTH)):
        source = begun(tmp_path / "2026-01-05_10-00-00_llama_wanda")
    assert source == tmp_path / FIRST


def test_a_folder_where_a_run_came_to_nothing_takes_over_another_one_all_the_same(tmp_path: Path) -> None:
    interrupted(tmp_path / FIRST)
    interrupted(tmp_path / SECOND, FACTS | {"batch_size": 7}, layers=0)
    source = begin(tmp_path / SECOND, FACTS, may_resume=True)
    assert source == tmp_path / FIRST
    assert Checkpoint(tmp_path / SECOND / FOLDER, 2).num_finished == 1


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (FIRST, SECOND.replace("wanda", "magnitude")),
        (FIRST, "llama_wanda"),
        ("run1", "run2"),
        ("2026-01-01_llama_wanda", SECOND),
    ],
)
def test_a_folder_of_another_name_is_left_alone(there: str, here: str, tmp_path: Path) -> None:
    interrupted(tmp_path / there)
    source = begun(tmp_path / here)
    assert source is None
    assert (tmp_path / there / FOLDER / "layer-00000.json").exists()


def test_without_leave_to_resume_nothing_is_taken_over(tmp_path: Path) -> None:
    interrupted(tmp_path / FIRST)
    source = begun(tmp_path / SECOND, may_resume=False)
    assert source is None
    assert (tmp_path / FIRST / FOLDER / "layer-00000.json").exists()


def claimed_and_killed(folder: Path) -> None:
    """In a process of its own: a run that finishes one layer and is killed while it writes another."""
    with owned(folder):
        begin(folder, FACTS, may_resume=True)
        (folder / FOLDER / "layer-00000.json").write_text("[]")
        (folder / FOLDER / ".layer-00001.safetensors.abc.unfinished").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_a_run_that_was_killed_holds_no_claim_and_its_half_written_files_go(name: str, tmp_path: Path) -> None:
    (outcome,) = launch(claimed_and_killed, tmp_path / FIRST, size=1, folder=tmp_path / "said")
    assert outcome.code == -signal.SIGKILL, outcome
    with owned(tmp_path / name):
        assert begun(tmp_path / name) == tmp_path / FIRST
    kept = sorted(path.name for path in (tmp_path / name / FOLDER).iterdir())
    assert kept == ["layer-00000.json", "settings.json"]
