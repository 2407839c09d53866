"""Files and folders are there whole or not at all, with the umask's permissions, and leave nothing behind."""

import errno
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from barber.errors import DiskError, UserError
from barber.runtime.files import (
    PutInPlaceLater,
    append_line,
    folder_written_whole,
    put_in_place,
    sweep,
    written_beside,
    written_whole,
)
from tests.processes import launch


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with written_whole(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
        assert unfinished.parent == tmp_path
        assert unfinished.name.startswith(".file.")
        assert unfinished.name.endswith(".unfinished")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_at_the_end_and_not_before(tmp_path: Path) -> None:
    with folder_written_whole(tmp_path / "model") as unfinished:
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "file").write_text("content")
        assert not (tmp_path / "model").exists()
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "inner" / "file").read_text() == "content"


def break_off_a_file(folder: Path, error: BaseException) -> None:
    with written_whole(folder / "file") as unfinished:
        unfinished.write_text("half")
        raise error


def break_off_a_folder(folder: Path, error: BaseException) -> None:
    with folder_written_whole(folder / "model") as unfinished:
        (unfinished / "file").write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("break_off", [break_off_a_file, break_off_a_folder])
def test_after_an_error_the_old_file_is_there_and_nothing_else(
    break_off: Callable[[Path, BaseException], None], error: BaseException, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(type(error)):
        break_off(tmp_path, error)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_does_not_reach_the_disk_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), written_whole(tmp_path / "file") as unfinished:
        unfinished.write_text("half")
    with pytest.raises(OSError, match="No space left"), folder_written_whole(tmp_path / "model") as unfinished:
        (unfinished / "file").write_text("half")
    assert names(tmp_path) == []


def test_content_is_brought_to_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        steps.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    with written_whole(tmp_path / "whole") as unfinished:
        unfinished.write_text("content")
    assert steps == ["file", "whole", "folder"]
    steps.clear()
    with folder_written_whole(tmp_path / "model") as unfinished:
        (unfinished / "config").write_text("content")
    assert steps == ["file", "folder", "model", "folder"]


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("")
    with pytest.raises(OSError, match="not empty"), folder_written_whole(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["precious"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_permissions_are_as_the_umask_has_them(mask: int, tmp_path: Path) -> None:
    """safetensors, left alone, gives its files to their owner and nobody else."""
    tensors = {"tensor": torch.zeros(2)}
    with umask(mask):
        with written_whole(tmp_path / "file") as unfinished:
            save_file(tensors, unfinished)
        with folder_written_whole(tmp_path / "model") as unfinished:
            (unfinished / "inner").mkdir()
            save_file(tensors, unfinished / "inner" / "file")
    assert permissions(tmp_path / "file") == 0o666 & ~mask
    assert permissions(tmp_path / "model") == 0o777 & ~mask
    assert permissions(tmp_path / "model" / "inner") == 0o777 & ~mask
    assert permissions(tmp_path / "model" / "inner" / "file") == 0o666 & ~mask


def write_often(path: Path, number: int) -> None:
    for _ in range(8):
        with written_whole(path) as unfinished:
            unfinished.write_text(f"{number}" * 1000)
            assert set(unfinished.read_text()) == {f"{number}"}


def write_by_rank(folder: Path) -> bool:
    write_often(folder / "file", int(os.environ["RANK"]))
    return True


def test_processes_that_write_the_same_file_are_not_in_each_others_way(tmp_path: Path) -> None:
    outcomes = launch(write_by_rank, tmp_path / "out", size=3, folder=tmp_path / "out")
    assert all(outcome.result for outcome in outcomes), outcomes
    content = (tmp_path / "out" / "file").read_text()
    assert len(content) == 1000 and len(set(content)) == 1
    assert not [name for name in names(tmp_path / "out") if "unfinished" in name]


# What killed processes leave


def killed_while_writing(folder: Path) -> None:
    with written_whole(folder / "file") as file, folder_written_whole(folder / "model") as model:
        file.write_text("half")
        (model / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A folder in which a process was killed while it wrote."""
    (outcome,) = launch(killed_while_writing, tmp_path, size=1, folder=tmp_path / "said")
    assert outcome.code == -signal.SIGKILL, outcome
    assert len(list(tmp_path.glob(".*.unfinished"))) == 2
    assert not (tmp_path / "file").exists() and not (tmp_path / "model").exists()
    return tmp_path


def test_who_has_the_folder_sweeps_it_of_what_he_names(left: Path) -> None:
    (left / "model.unfinished").write_text("a file of the user's")
    sweep(left, "model.*")
    assert [path.name[:6] for path in left.glob(".*.unfinished")] == [".file."]
    sweep(left)
    assert names(left) == ["model.unfinished", "said"]


def test_what_may_be_another_process_at_work_stays_for_a_day(left: Path) -> None:
    for path in left.glob(".*.unfinished"):
        os.utime(path, (time.time() - 80_000,) * 2)
    with written_whole(left / "file") as file, folder_written_whole(left / "model"):
        file.write_text("whole")
    assert len(list(left.glob(".*.unfinished"))) == 2
    assert (left / "file").read_text() == "whole"


def test_the_leavings_of_a_day_go_when_the_same_is_written_again(left: Path) -> None:
    (left / ".other.abc.unfinished").write_text("of another file")
    for path in left.glob(".*.unfinished"):
        os.utime(path, (time.time() - 90_000,) * 2)
    with written_whole(left / "file") as file, folder_written_whole(left / "model"):
        file.write_text("whole")
    assert [path.name for path in left.glob(".*.unfinished")] == [".other.abc.unfinished"]


# Several files at once, and later


def written(folder: Path, *files: str) -> list[tuple[Path, Path]]:
    pairs = []
    for name in files:
        with written_beside(folder / name) as unfinished:
            unfinished.write_text(name)
        pairs.append((unfinished, folder / name))
    return pairs


def test_files_get_their_names_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        order.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    files = written(tmp_path, "b", "a", "c")
    assert not any((tmp_path / name).exists() for name in "abc")
    put_in_place(files)
    assert order == ["b", "a", "c"]
    assert names(tmp_path) == ["a", "b", "c"]


def test_later_is_in_order_too_and_what_is_obsolete_goes_last(tmp_path: Path) -> None:
    later = PutInPlaceLater()
    (tmp_path / "old").write_text("")
    later.order(written(tmp_path, "first"), obsolete=tmp_path / "old")
    later.order(written(tmp_path, "second"), obsolete=tmp_path / "never there")
    later.wait()
    later.wait()
    assert names(tmp_path) == ["first", "second"]


def test_an_error_comes_out_when_somebody_waits_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    later = PutInPlaceLater()
    (tmp_path / "old").write_text("")
    files = written(tmp_path, "file")
    monkeypatch.setattr(os, "fsync", full)
    later.order(files, obsolete=tmp_path / "old")
    with pytest.raises(OSError, match="No space left"):
        later.wait()
    later.wait()
    assert names(tmp_path) == ["old"]


# What the disk does not take


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("made up"), "made up"),
        (SafetensorError("Error while serializing: I/O error: Read-only (os error 30)"), "Read-only"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),  # of tokenizers
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [written_whole, folder_written_whole])
def test_what_a_disk_does_not_take_is_told_with_its_path(
    whole: Any, error: Exception, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DiskError) as told, whole(tmp_path / "it"):
        raise error
    assert str(told.value) == f"{tmp_path / 'it'} cannot be written: {reason}"
    assert names(tmp_path) == []


def test_other_errors_are_not_the_disks(tmp_path: Path) -> None:
    for error in (KeyError("a"), UserError("a mistake"), KeyboardInterrupt()):
        with pytest.raises(type(error)), written_whole(tmp_path / "file"):
            raise error
    assert names(tmp_path) == []


def test_a_line_is_whole_also_after_a_torn_one(tmp_path: Path) -> None:
    append_line(tmp_path / "lines", "first")
    with (tmp_path / "lines").open("a") as lines:
        lines.write('{"torn')
    append_line(tmp_path / "lines", "last")
    assert (tmp_path / "lines").read_text() == 'first\n{"torn\nlast\n'
    with pytest.raises(DiskError, match=f"^{tmp_path} cannot be written: Is a directory$"):
        append_line(tmp_path, "line")
