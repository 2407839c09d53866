"""Locks between processes, each a file; the system gives them up when their process ends, however it ends.

Where a file system has no such locks (some network disks), a file that is there is the lock. It may outlive a process
that is killed on another machine: who waits for it too long is told what to delete.
"""

import errno
import logging
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import BaseFileLock, FileLock, ReadWriteLock, SoftFileLock, Timeout

from barber.errors import DiskError
from barber.runtime.files import remove

log = logging.getLogger("barber")

# A wait inside of SQLite hears no Ctrl-C.
_PATIENCE_SECONDS = 1.0
# How long a lock is waited for that may be that of a process which is gone.
SOFT_PATIENCE_SECONDS = 600.0
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


def locked(path: Path) -> BaseFileLock | None:
    """The lock of a file, held until it is released or the process ends; None where somebody else holds it.

    Raises:
        OSError: the file cannot be made.
    """
    lock: BaseFileLock = FileLock(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # that it falls back to what comes here, too
            lock.acquire(blocking=False)
    except Timeout:
        return None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        return _soft(path)
    return lock


def left_behind(path: Path) -> Path | None:
    """The file of a lock that may have outlived its holder; None where the system itself gives locks up."""
    for file in (_beside(path), path):
        with suppress(OSError):
            if file.read_bytes():  # that of a system's lock is empty
                return file
    return None


def removed(lock: BaseFileLock) -> None:
    """Release a lock, and remove its file: who has opened it meanwhile finds it without a name, and makes a new one."""
    if not isinstance(lock, SoftFileLock):  # which goes by itself
        with suppress(OSError):
            Path(lock.lock_file).unlink()
    lock.release()


def _soft(path: Path) -> BaseFileLock | None:
    lock = SoftFileLock(_beside(path))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.soft")


class SharedLock:
    """A lock that many readers hold at a time, or one writer alone.

    Where the system has no such locks one reader at a time has to do.

    Args:
        path: of the file, which stays.
        what: it guards, in words, for the log line of who waits.

    Raises:
        OSError: the file cannot be made; of all methods, too.
        DiskError: the lock has been waited for in vain, where it may be that of a process which is gone.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._lock: ReadWriteLock | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or (path.exists() and path.stat().st_size):  # nobody's: a lock is an empty file
            remove(path)
        with suppress(sqlite3.Error):
            self._lock = ReadWriteLock(path, is_singleton=False)  # else a thread would have what another one holds

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Together with other readers; waits for a writer."""
        with self._held("acquire_read"):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone; waits for everybody else."""
        with self._held("acquire_write"):
            yield

    @contextmanager
    def writing_at_once(self) -> Iterator[bool]:
        """Alone, or not at all: False where somebody else holds the lock."""
        try:
            if self._lock is None:
                raise OSError(f"{self._path} is no lock")
            self._lock.acquire_write(blocking=False)
        except (Timeout, sqlite3.Error, OSError):
            yield False
            return
        try:
            yield True
        finally:
            self._lock.release()

    @contextmanager
    def _held(self, how: Literal["acquire_read", "acquire_write"]) -> Iterator[None]:
        try:
            lock = self._acquired(how)
        except sqlite3.Error:
            lock = None
        if lock is None:
            with self._held_softly():
                yield
            return
        try:
            yield
        finally:
            lock.release()

    def _acquired(self, how: str) -> ReadWriteLock | None:
        if self._lock is None:
            return None
        acquire = getattr(self._lock, how)
        try:
            acquire(blocking=False)
        except Timeout:
            log.info("Waiting for %s, which another run computes.", self._what)
            while not _came(acquire):
                pass
        return self._lock

    @contextmanager
    def _held_softly(self) -> Iterator[None]:
        lock = SoftFileLock(_beside(self._path))
        try:
            lock.acquire(timeout=SOFT_PATIENCE_SECONDS, poll_interval=0.1)
        except Timeout as error:
            raise DiskError(
                f"{self._what} has been waited for, {SOFT_PATIENCE_SECONDS:.0f} s; where no other run is at work, "
                f"delete {_beside(self._path)}"
            ) from error
        try:
            yield
        finally:
            lock.release()


def _came(acquire: Callable[..., Any]) -> bool:
    try:
        acquire(timeout=_PATIENCE_SECONDS)
    except Timeout:
        return False
    return True
