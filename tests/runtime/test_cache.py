"""What is kept across runs is complete or not there, belongs to one maker at a time, and stays below its limit."""

import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barber.data.texts import tokenise
from barber.methods.block import Pruned
from barber.runtime.cache import Cache, Entry, cache_folder
from barber.runtime.files import remove, written_whole
from barber.runtime.locks import SharedLock
from barber.walk.initial import InitialMasks
from tests import tiny
from tests.damage import DAMAGES
from tests.processes import launch


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BARBER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(entry: Entry, content: bytes = b"something") -> bytes:
    """What an entry holds, which is made if it is not there."""
    file = entry.folder / "content"

    def make() -> bytes:
        file.write_bytes(content)
        entry.complete()
        return content

    return entry.read_or_make("it", lambda: file.read_bytes() if file.exists() else None, make)


def test_an_entry_is_made_once(folder: Path) -> None:
    assert made(Cache().entry("kind", {"a": 1})) == b"something"
    assert made(Cache().entry("kind", {"a": 1}), b"else") == b"something"
    (facts,) = folder.glob("kept/kind/*/facts.json")
    assert json.loads(facts.read_text())["content"] == {"a": 1}


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), min_size=1))
def test_its_name_depends_on_every_fact_and_not_on_their_order(facts: dict[str, Any]) -> None:
    key = Cache().entry("kind", facts).key
    assert Cache().entry("kind", dict(reversed(facts.items()))).key == key
    assert Cache().entry("other", facts).key != key
    for name in facts:
        assert Cache().entry("kind", facts | {name: "another value"}).key != key
        assert Cache().entry("kind", {k: v for k, v in facts.items() if k != name}).key != key


def test_what_was_not_completed_is_made_again() -> None:
    entry = Cache().entry("kind", {})
    with entry.opened("it") as complete:
        assert not complete
        (entry.folder / "content").write_bytes(b"half")
    assert made(entry) == b"something"


def test_what_is_broken_is_made_again() -> None:
    entry = Cache().entry("kind", {})
    made(entry, b"old")
    (entry.folder / "content").unlink()
    assert made(entry, b"new") == b"new"
    assert made(entry, b"newer") == b"new"


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_dropped_with_a_sentence_and_made_again(
    damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    entry = Cache().entry("kind", {})
    for name in ("content", "facts.json"):
        made(entry)
        caplog.clear()
        DAMAGES[damage](entry.folder / name)
        assert made(entry, b"made again") == b"made again"
        told = [] if (name, damage) == ("facts.json", "gone") else ["it"]  # as if it had not been finished
        assert [record.args[0] for record in caplog.records if record.args] == told
        assert made(entry, b"once more") == b"made again"
        entry.discard()


@pytest.mark.parametrize("place", ["kept", "kept/kind", "kept/kind/KEY", "kept/.locks", "kept/.locks/kind-KEY"])
def test_something_else_in_its_place_makes_way(place: str, folder: Path) -> None:
    entry = Cache().entry("kind", {})
    made(entry)
    path = folder / place.replace("KEY", entry.key)
    was_folder = path.is_dir()
    remove(path)
    if was_folder:
        path.write_bytes(b"a file")
    else:
        path.mkdir()
    assert made(entry, b"new") in (b"new", b"something")
    assert entry.is_complete


def test_a_cache_that_vanishes_costs_work_and_nothing_else(folder: Path) -> None:
    entry = Cache().entry("initial", {})
    weight_OI = torch.randn(2, 8)
    pruned = {"linear": Pruned.masking(weight_OI, weight_OI > 0)}
    with entry.opened("the initial masks"):
        masks = InitialMasks(entry.folder, complete=False)
        masks.write(0, {"linear": weight_OI}, pruned)
        assert masks.has_all(1)
        entry.complete()
    with entry.opened("the initial masks") as complete:
        masks = InitialMasks(entry.folder, complete)
        shutil.rmtree(folder)
        assert torch.equal(masks.read(0, {"linear": weight_OI})["linear"].mask_OI, weight_OI > 0)
    with entry.opened("the initial masks") as complete:
        assert not complete
        masks = InitialMasks(entry.folder, complete)
        shutil.rmtree(folder)
        masks.write(0, {"linear": weight_OI}, pruned)
        assert not masks.has_all(1)


def make_or_wait(log: str) -> bytes:
    """In a process of its own: a line in the log if the entry had to be made."""

    def content() -> bytes:
        entry = Cache().entry("kind", {})
        with entry.opened("it") as complete:
            if not complete:
                with Path(log).open("a") as lines:
                    lines.write("made\n")
                threading.Event().wait(0.3)
                (entry.folder / "content").write_bytes(b"whole")
                entry.complete()
            return (entry.folder / "content").read_bytes()

    return content()


def test_of_many_processes_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    outcomes = launch(make_or_wait, str(tmp_path / "log"), size=4, folder=tmp_path / "said")
    assert [outcome.result for outcome in outcomes] == [b"whole"] * 4, outcomes
    assert (tmp_path / "log").read_text() == "made\n"


def test_readers_do_not_wait_for_each_other() -> None:
    entry = Cache().entry("kind", {})
    made(entry)
    with entry.opened("it") as first, entry.opened("it") as second:
        assert first and second


def test_a_maker_that_is_killed_leaves_the_entry_to_the_next(tmp_path: Path) -> None:
    (outcome,) = launch(killed_while_it_makes, size=1, folder=tmp_path)
    assert outcome.code == -9
    entry = Cache().entry("kind", {})
    assert len(list(entry.folder.glob(".*.unfinished"))) == 1
    assert made(entry) == b"something"
    assert not list(entry.folder.glob(".*.unfinished"))


def killed_while_it_makes() -> None:
    entry = Cache().entry("kind", {})
    with entry.opened("it"), written_whole(entry.folder / "content") as unfinished:
        unfinished.write_bytes(b"half")
        os.kill(os.getpid(), 9)


def used_at(entry: Entry, seconds: int) -> None:
    for file in entry.folder.iterdir():
        os.utime(file, (seconds, seconds))


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache = Cache(max_gib=2500 / 2**30)
    entries = [cache.entry("kind", {"number": number}) for number in range(3)]
    for number, entry in enumerate(entries[:2]):
        made(entry, bytes(1000))
        used_at(entry, number)
    made(entries[0])  # used again
    made(entries[2], bytes(1000))
    assert [entry.is_complete for entry in entries] == [True, False, True]


def test_nothing_goes_that_is_in_use() -> None:
    cache = Cache(max_gib=1500 / 2**30)
    old, new = (cache.entry("kind", {"number": number}) for number in range(2))
    made(old, bytes(1000))
    used_at(old, 1)
    with old.opened("it"):
        made(new, bytes(1000))
        assert old.is_complete


def test_models_that_were_converted_stay(folder: Path) -> None:
    (folder / "models" / "llama").mkdir(parents=True)
    (folder / "models" / "llama" / "model.safetensors").write_bytes(bytes(5000))
    made(Cache(max_gib=1500 / 2**30).entry("kind", {}), bytes(1000))
    assert (folder / "models" / "llama" / "model.safetensors").exists()


def test_a_folder_that_cannot_be_made_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BARBER_CACHE", str(tmp_path / "file" / "cache"))
    tokenizer = tiny.tokenizer()
    with caplog.at_level(logging.WARNING, logger="barber"):
        tokens_T = tokenise("a text", tokenizer, Cache())
    assert torch.equal(tokens_T, tokenise("a text", tokenizer))
    (record,) = caplog.records
    assert record.getMessage().startswith("The token ids are not kept for other runs: ")


def test_token_ids_are_kept_by_text_and_tokenizer(folder: Path) -> None:
    tokenizer = tiny.tokenizer()
    first = tokenise("a text", tokenizer, Cache())
    (file,) = folder.glob("kept/tokens/*/tokens.safetensors")
    before = file.stat().st_mtime_ns
    assert torch.equal(tokenise("a text", tokenizer, Cache()), first)
    assert file.stat().st_mtime_ns == before
    tokenise("another text", tokenizer, Cache())
    tokenizer.add_tokens(["text"])
    assert len(tokenise("a text", tokenizer, Cache())) < len(first)
    assert len(list(folder.glob("kept/tokens/*"))) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Initial masks


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_initial_masks_come_back_bit_for_bit(outputs: int, inputs: int, updated: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense_OI = torch.randn(outputs, inputs, generator=generator)
    dense_OI[0, 0] = -0.0
    mask_OI = torch.rand(outputs, inputs, generator=generator) < 0.5
    pruned = Pruned.masking(dense_OI * 1.5 if updated else dense_OI, mask_OI)
    folder = cache_folder() / f"{outputs}-{inputs}-{updated}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    masks = InitialMasks(folder, complete=False)
    masks.write(0, {"linear": dense_OI}, {"linear": pruned})
    assert masks.has_all(1)
    found = InitialMasks(folder, complete=True).read(0, {"linear": dense_OI})["linear"]
    assert torch.equal(found.mask_OI, mask_OI)
    assert torch.equal(found.weight_OI.view(torch.int32), pruned.weight_OI.view(torch.int32))


def test_a_full_disk_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("barber.walk.initial.save_file", full)
    masks, weight_OI = InitialMasks(tmp_path, complete=False), torch.randn(2, 4)
    with caplog.at_level(logging.WARNING, logger="barber"):
        for index in range(3):
            masks.write(index, {"linear": weight_OI}, {"linear": Pruned.masking(weight_OI, weight_OI > 0)})
    assert [record.getMessage().endswith("No space left on device") for record in caplog.records] == [True]
    assert not masks.has_all(1)


def test_locks_are_not_left_held() -> None:
    entry = Cache().entry("kind", {})
    made(entry)
    (lock,) = (cache_folder() / "kept" / ".locks").iterdir()
    with SharedLock(lock, "it").writing_at_once() as alone:
        assert alone
