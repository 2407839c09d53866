"""What runs compute alike is kept across them: found by all that it depends on, shared safely, bounded in size.

An entry is a folder of files and, written last, `facts.json`: what the entry depends on, whose hash is its name, and
the digests of the files. Whoever opens the entry compares them: what is damaged is dropped and made anew.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from barber.errors import DiskError, UserError
from barber.runtime.files import remove, sweep
from barber.runtime.locks import SharedLock
from barber.runtime.seals import DamagedError, Seal

log = logging.getLogger("barber")

_COMPLETE = "facts.json"
_LOCKS = ".locks"
# Of entries; one more whenever it changes: older ones are not found any more.
_FORMAT = 2

T = TypeVar("T")


def cache_folder() -> Path:
    """Where everything is kept: `BARBER_CACHE`, by default `barber` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "barber"
    return Path(os.environ.get("BARBER_CACHE") or default)


@dataclass(frozen=True)
class Cache:
    """Entries in `BARBER_CACHE`.

    Args:
        max_gib: what all of them may take together, in GiB; those that were not used for longest go first.
    """

    max_gib: float = 20.0

    def __post_init__(self) -> None:
        if not self.max_gib > 0:
            raise UserError(f"must be above 0, not {self.max_gib}; cache=off does without", field="max_gib")

    def entry(self, kind: str, facts: dict[str, Any]) -> "Entry":
        """The entry of something that is made, given what it depends on."""
        text = json.dumps({"kind": kind, "format": _FORMAT} | facts, sort_keys=True)
        return Entry(self, kind, hashlib.sha256(text.encode()).hexdigest()[:32], facts)


@dataclass(frozen=True)
class Entry:
    """What the cache holds, or is to hold, about one thing."""

    cache: Cache
    kind: str
    key: str
    facts: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Its files."""
        return cache_folder() / "kept" / self.kind / self.key

    @property
    def is_complete(self) -> bool:
        """Whether it is there, as it was written."""
        try:
            Seal.read(self.folder / _COMPLETE).require(self.folder)
        except (DamagedError, OSError):
            return False
        return True

    @contextmanager
    def opened(self, what: str) -> Iterator[bool]:
        """Wait until no other run makes this entry; gives whether it is complete.

        If it is, it stays inside this context. If not, it is the caller's to make: other runs that want it wait. A
        cache that cannot be written to gives False; the caller finds out when it writes.

        Args:
            what: it is, in words, for the log line of a run that waits.
        """
        with ExitStack() as held:
            try:
                complete = self._held(what, held)
            except OSError as error:
                if isinstance(error, DiskError):  # a lock; whatever else it is, the caller finds out
                    log.warning("The cache is done without: %s", error)
                complete = False
            yield complete

    def _held(self, what: str, held: ExitStack) -> bool:
        """Wait for the entry, and have its lock given up by `held`; returns whether it is complete."""
        self._make_way()
        lock = _lock(self.folder, what)
        while True:
            with ExitStack() as reading:
                reading.enter_context(lock.reading())
                if self.is_complete:
                    with suppress(OSError):
                        os.utime(self.folder / _COMPLETE)
                    held.enter_context(reading.pop_all())
                    return True
            with ExitStack() as writing:
                writing.enter_context(lock.writing())
                if not self.is_complete:  # as it may be by now
                    self._clear(what)
                    held.enter_context(writing.pop_all())
                    return False

    def complete(self) -> None:
        """Its files are written: let other runs use them. To be called by whoever holds it.

        Raises:
            OSError: that was not possible.
        """
        own = (file for file in sorted(self.folder.iterdir()) if file.name != _COMPLETE)
        files = {file.name: file for file in own if not file.name.startswith(".")}
        Seal.of(self.facts, files).write(self.folder / _COMPLETE)
        _make_room(int(self.cache.max_gib * 2**30), self.folder)

    def discard(self) -> None:
        """Let it be made anew: it is broken."""
        with suppress(OSError):
            remove(self.folder / _COMPLETE)

    def _make_way(self) -> None:
        """Its folder, also where something else has the name of one."""
        kept = self.folder.parent.parent
        for place in (kept, kept / _LOCKS, self.folder.parent, self.folder):
            if not place.is_dir():
                remove(place)
                place.mkdir(parents=True, exist_ok=True)

    def _clear(self, what: str) -> None:
        """Leave nothing but what a killed run has made of it; where it was complete once, say so and leave nothing."""
        with suppress(OSError):
            if os.path.lexists(self.folder / _COMPLETE):
                log.warning("What was kept of %s in %s is damaged; it is made anew.", what, self.folder)
                remove(self.folder)
            self.folder.mkdir(exist_ok=True)
            for left in self.folder.iterdir():
                if left.is_dir():
                    remove(left)
            sweep(self.folder)

    def read_or_make(self, what: str, read: Callable[[], T | None], make: Callable[[], T]) -> T:
        """What `read` finds in the complete entry, or else what `make` makes and completes the entry with.

        Args:
            read: gives None where the entry is broken, which is made anew then.
        """
        for _ in range(2):
            with self.opened(what) as complete:
                if not complete:
                    return make()
                if (found := read()) is not None:
                    return found
            self.discard()
        return make()


def _lock(entry: Path, what: str = "") -> SharedLock:
    """Beside the entries: a lock has to outlive the folder that it is about."""
    return SharedLock(entry.parent.parent / _LOCKS / f"{entry.parent.name}-{entry.name}", what)


def _make_room(max_bytes: int, own: Path) -> None:
    """Remove the entries that were not used for longest, but none that is in use, until the rest fits."""
    sizes: dict[Path, tuple[float, int]] = {}
    for entry in own.parent.parent.glob("[!.]*/*"):
        with suppress(OSError):  # another run was faster
            used = max((file.stat().st_mtime for file in entry.iterdir()), default=entry.stat().st_mtime)
            sizes[entry] = used, sum(file.stat().st_size for file in entry.iterdir())
    total = sum(size for _, size in sizes.values())
    for entry, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
        if total <= max_bytes:
            return
        if entry != own and _removed(entry):
            total -= size
    if total > max_bytes:
        log.warning("What is kept in %s takes %.1f GiB, more than cache.max_gib.", own.parent.parent, total / 2**30)


def _removed(entry: Path) -> bool:
    with _lock(entry).writing_at_once() as alone:
        if alone:
            with suppress(OSError):
                remove(entry / _COMPLETE)  # first: what is half removed is not there
                remove(entry)
        return alone
