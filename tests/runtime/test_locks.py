"""Locks hold between processes, readers share theirs, and none outlives its process."""

import errno
import logging
import os
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from barber.errors import DiskError
from barber.runtime import locks
from barber.runtime.locks import SharedLock, left_behind, locked, removed
from tests.processes import launch


def alone(path: Path) -> bool:
    with SharedLock(path, "it").writing_at_once() as gained:
        return gained


def held_and_killed(folder: Path) -> tuple[bool, ...]:
    """In a process of its own, with every kind of lock."""
    lock = locked(folder / "exclusive")
    with SharedLock(folder / "read", "it").reading(), SharedLock(folder / "written", "it").writing():
        (folder / "held").touch()
        while not (folder / "seen").exists():
            time.sleep(0.01)
        assert lock is not None
        os.kill(os.getpid(), signal.SIGKILL)
    return ()


def test_a_lock_is_seen_by_other_processes_and_goes_with_the_one_that_is_killed(tmp_path: Path) -> None:
    seen: list[bool] = []

    def look() -> None:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        seen.append(locked(tmp_path / "exclusive") is None)
        seen.append(not alone(tmp_path / "read"))
        seen.append(not alone(tmp_path / "written"))
        with SharedLock(tmp_path / "read", "it").reading():
            seen.append(True)
        (tmp_path / "seen").touch()

    looking = threading.Thread(target=look)
    looking.start()
    (outcome,) = launch(held_and_killed, tmp_path, size=1, folder=tmp_path / "said")
    looking.join()
    assert outcome.code == -signal.SIGKILL, outcome
    assert seen == [True] * 4
    assert alone(tmp_path / "read") and alone(tmp_path / "written")
    lock = locked(tmp_path / "exclusive")
    assert lock is not None
    lock.release()


def test_a_lock_that_is_released_may_be_had_again(tmp_path: Path) -> None:
    first = locked(tmp_path / "lock")
    assert first is not None
    assert locked(tmp_path / "lock") is None
    first.release()
    again = locked(tmp_path / "lock")
    assert again is not None
    again.release()


def test_readers_keep_out_a_writer_who_waits_for_them_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order: list[str] = []

    def write() -> None:
        with SharedLock(tmp_path / "lock", "the results").writing():
            order.append("written")

    writer = threading.Thread(target=write)
    with caplog.at_level(logging.INFO, logger="barber"), SharedLock(tmp_path / "lock", "it").reading():
        writer.start()
        while not caplog.records:
            time.sleep(0.01)
        order.append("read")
    writer.join()
    assert order == ["read", "written"]
    assert [record.getMessage() for record in caplog.records] == [
        "Waiting for the results, which another run computes."
    ]


def waiting(folder: Path) -> str:
    """In a process of its own, which hears Ctrl-C as soon as it waits."""
    # A process inherits an ignored SIGINT, as that of a shell's background job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    came = locks._came

    def interrupted(acquire: Any) -> bool:
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
        return came(acquire)

    locks._came = interrupted
    try:
        with SharedLock(folder / "lock", "it").reading():
            return "gained"
    except KeyboardInterrupt:
        return "interrupted"


def test_who_waits_hears_ctrl_c(tmp_path: Path) -> None:
    with SharedLock(tmp_path / "lock", "it").writing():
        (outcome,) = launch(waiting, tmp_path, size=1, folder=tmp_path / "said")
    assert outcome.result == "interrupted"


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "no locks"), OSError(errno.ENOSYS, "no locks")])
def test_where_the_disk_has_no_locks_a_file_is_one(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("filelock.ReadWriteLock.acquire_read", _sqlite_refuses)
    monkeypatch.setattr("filelock.ReadWriteLock.acquire_write", _sqlite_refuses)
    monkeypatch.setattr(locks, "SOFT_PATIENCE_SECONDS", 0.1)
    lock = locked(tmp_path / "one")
    assert lock is not None and locked(tmp_path / "one") is None
    assert left_behind(tmp_path / "one") is not None
    removed(lock)
    again = locked(tmp_path / "one")
    assert again is not None
    removed(again)
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]
    shared = SharedLock(tmp_path / "shared", "the results")
    with shared.reading(), pytest.raises(DiskError, match=r"the results .* delete .*/shared\.soft$"):
        SharedLock(tmp_path / "shared", "the results").writing().__enter__()
    with shared.writing():
        pass


def _sqlite_refuses(*_: Any, **__: Any) -> None:
    raise sqlite3.OperationalError("disk I/O error")


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        SharedLock(tmp_path / "file" / "lock", "it")
