"""Locks between processes, each a file; the system gives them up when their process ends, however it ends."""

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, ReadWriteLock, Timeout

from barber.runtime.files import remove

log = logging.getLogger("barber")

# A wait inside of SQLite hears no Ctrl-C.
_PATIENCE_SECONDS = 1.0


def locked(path: Path) -> BaseFileLock | None:
    """The lock of a file, held until it is released or the process ends; None where somebody else holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


class SharedLock:
    """A lock that many readers hold at a time, or one writer alone.

    Args:
        path: of the file, which stays.
        what: it guards, in words, for the log line of who waits.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._what = what
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or (path.exists() and path.stat().st_size):  # nobody's: a lock is an empty file
            remove(path)
        try:
            self._lock = ReadWriteLock(path, is_singleton=False)  # else a thread would have what another one holds
        except sqlite3.Error as error:
            raise OSError(f"{path} is no lock: {error}") from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Together with other readers; waits for a writer."""
        with self._held(self._lock.acquire_read):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone; waits for everybody else."""
        with self._held(self._lock.acquire_write):
            yield

    @contextmanager
    def writing_at_once(self) -> Iterator[bool]:
        """Alone, or not at all: False where somebody else holds the lock."""
        try:
            self._lock.acquire_write(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            self._lock.release()

    @contextmanager
    def _held(self, acquire: Callable[..., Any]) -> Iterator[None]:
        try:
            acquire(blocking=False)
        except Timeout:
            log.info("Waiting for %s, which another run computes.", self._what)
            while not _came(acquire):
                pass
        try:
            yield
        finally:
            self._lock.release()


def _came(acquire: Callable[..., Any]) -> bool:
    try:
        acquire(timeout=_PATIENCE_SECONDS)
    except Timeout:
        return False
    return True
