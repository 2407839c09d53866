"""Files and folders that are there whole or not at all, however the process that writes them ends.

Each is written beside its place under a temporary name that no other process has, `.NAME.XXXXXXXXXXXX.unfinished`,
brought to the disk, and renamed. What a killed process left under such a name is never read. It goes when somebody who
has the folder for himself sweeps it, or when the same file is written a day later.
"""

import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from glob import escape
from pathlib import Path
from stat import S_IMODE
from uuid import uuid4

from safetensors import SafetensorError

from barber.errors import BarberError, DiskError

_ENDING = ".unfinished"
# Longer than any writer lets its work lie.
_DAY_SECONDS = 86400


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the disk has against writing a file or a folder inside this context is said with its path.

    Raises:
        DiskError: it has something.
    """
    try:
        yield
    except BarberError:
        raise
    except Exception as error:
        # A library in Rust says it with an error of its own, and tokenizers with a plain Exception.
        foreign = re.search(r"([^:]+) \(os error \d+\)", str(error))
        if not isinstance(error, OSError | SafetensorError) and foreign is None:
            raise
        own = error.strerror if isinstance(error, OSError) else None
        reason = own or (foreign[1].strip() if foreign else " ".join(str(error).split()))
        raise DiskError(f"{path} cannot be written: {reason}") from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a file in one write, so that it is whole, whoever else adds some; a torn one before it is ended.

    Raises:
        DiskError: that was not possible.
    """
    with writing(path), path.open("ab+") as lines:
        torn = lines.seek(0, os.SEEK_END) and (lines.seek(-1, os.SEEK_END), lines.read(1))[1] != b"\n"
        lines.write((b"\n" if torn else b"") + line.encode() + b"\n")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file to be written inside this context; at its end it takes the place of `path`.

    After an error nothing of it is left.

    Raises:
        DiskError: it cannot be written.
    """
    with written_beside(path) as unfinished:
        yield unfinished
    put_in_place([(unfinished, path)])


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary file to be written inside this context, and to be put in the place of `path` by `put_in_place`."""
    unfinished = _beside(path)
    with writing(path):
        try:
            unfinished.touch(exist_ok=False)
            mode = S_IMODE(unfinished.stat().st_mode)
            yield unfinished
            _give_mode(unfinished, mode)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise


def put_in_place(files: Sequence[tuple[Path, Path]]) -> None:
    """Bring temporary files to the disk and give them their names, in their order.

    Args:
        files: of one folder, each with its name.

    Raises:
        DiskError: that was not possible; those without a name yet are removed.
    """
    try:
        for unfinished, path in files:
            with writing(path):
                _sync(unfinished)
                unfinished.rename(path)
        for folder in {path.parent for _, path in files}:
            _sync(folder)
    except BaseException:
        _discard(files)
        raise


class PutInPlaceLater:
    """`put_in_place` in a thread of its own, one call after the other: nobody waits for the disk meanwhile."""

    def __init__(self, thread: Executor | None = None) -> None:
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="files")
        self._under_way: Future[None] | None = None

    def order(
        self,
        files: Sequence[tuple[Path, Path]],
        last: Callable[[], tuple[Path, Path]] | None = None,
        obsolete: Path | None = None,
    ) -> None:
        """Put files in place, and remove an obsolete one then; what was ordered before is waited for.

        Args:
            last: writes one more, which is put in place after them.
        """
        self.wait()
        self._under_way = self._thread.submit(_put_in_place_of, files, last, obsolete)

    def wait(self) -> None:
        """Wait until all that was ordered is on the disk.

        Raises:
            DiskError: it could not be.
        """
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to be filled inside this context; at its end it becomes `folder`, which must not be there.

    After an error nothing of it is left.

    Raises:
        DiskError: it cannot be written.
    """
    unfinished = _beside(folder)
    with writing(folder):
        try:
            unfinished.mkdir()
            mode = S_IMODE(unfinished.stat().st_mode)
            yield unfinished
            for path in unfinished.rglob("*"):
                _give_mode(path, mode if path.is_dir() else mode & 0o666)
                _sync(path)
            _sync(unfinished)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        _sync(folder.parent)


def remove_whole(folder: Path) -> None:
    """Remove a folder, so that at no time a part of it is there under its name.

    Raises:
        DiskError: that was not possible.
    """
    with writing(folder):
        rest = folder.rename(_beside(folder))
        shutil.rmtree(rest)


def sweep(folder: Path, name: str = "*", untouched_seconds: float = 0) -> None:
    """Remove what killed processes left unfinished in a folder; to be called where nobody else writes.

    Args:
        name: a pattern of what was to be written.
        untouched_seconds: how long it has to lie there already.
    """
    for left in folder.glob(f".{name}{_ENDING}"):
        with suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime < untouched_seconds:
                continue
            remove(left)


def remove(path: Path) -> None:
    """Remove what has a name, be it a file, a folder or a link; nothing may be there.

    Raises:
        OSError: that was not possible.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class HeldFile:
    """A file that can be read as long as this lives, also when its name has gone or is another file's.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        by_number = Path(f"/dev/fd/{descriptor}")
        self.path = by_number if by_number.exists() else path


def _beside(path: Path) -> Path:
    sweep(path.parent, f"{escape(path.name)}.*", _DAY_SECONDS)
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}{_ENDING}")


def _put_in_place_of(
    files: Sequence[tuple[Path, Path]], last: Callable[[], tuple[Path, Path]] | None, obsolete: Path | None
) -> None:
    try:
        following = [last()] if last is not None else []
    except BaseException:
        _discard(files)
        raise
    put_in_place([*files, *following])
    if obsolete is not None:
        with writing(obsolete):
            obsolete.unlink(missing_ok=True)


def _discard(files: Sequence[tuple[Path, Path]]) -> None:
    for unfinished, _ in files:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _give_mode(path: Path, mode: int) -> None:
    """What the umask leaves to others, too: safetensors gives its files to their owner alone."""
    if S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Not every file system can do it for folders.
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
