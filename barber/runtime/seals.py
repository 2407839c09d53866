"""Digests of what was written, compared when it is read: what the disk has made of it since is never used.

A seal is a JSON file that is written last: a content of its own, size and SHA-256 of the files that it completes, and
SHA-256 of all that.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from barber.runtime.files import put_in_place, written_beside
from barber.runtime.plain import typed

KEY = "sha256"
_THREADS = 4


class DamagedError(ValueError):
    """A file is not what was written: its path, and what it is instead."""


@dataclass(frozen=True)
class Seal:
    """What a seal says.

    Args:
        content: anything that JSON has.
        files: size in bytes and SHA-256 of files in the seal's folder, by name.
    """

    content: Any
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Any, files: Mapping[str, Path]) -> "Seal":
        """The seal of files, each by the name that it has or will have."""
        sizes = [path.stat().st_size for path in files.values()]
        digests = _digests_of(list(files.values()))
        return cls(content, dict(zip(files, zip(sizes, digests, strict=True), strict=True)))

    @classmethod
    def read(cls, path: Path) -> "Seal":
        """The seal in a file.

        Raises:
            DamagedError: there is none, or what is there is not one.
        """
        try:
            found = unsealed(json.loads(path.read_bytes()), path)
            files = {name: (int(size), str(digest)) for name, (size, digest) in found["files"].items()}
            return cls(found["content"], files)
        except DamagedError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{path} is damaged or not there") from error

    def write(self, path: Path) -> None:
        """Write the seal, whole or not at all."""
        put_in_place([self.write_beside(path)])

    def write_beside(self, path: Path) -> tuple[Path, Path]:
        """Write the seal under a temporary name; returns that and its own, for `put_in_place`."""
        with written_beside(path) as unfinished:
            text = json.dumps(sealed({"content": self.content, "files": self.files}))
            unfinished.write_text(text, encoding="utf-8")
        return unfinished, path

    def require(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Compare files with what the seal says of them: those of the given names, or all of them.

        Raises:
            DamagedError: one is another, or not there.
        """
        wanted = list(self.files if names is None else names)
        paths = [folder / name for name in wanted]
        for name, path in zip(wanted, paths, strict=True):
            if not path.is_file():
                raise DamagedError(f"{path} is not there")
            if name not in self.files or path.stat().st_size != self.files[name][0]:
                raise DamagedError(f"{path} is damaged, it has another size than was written")
        for name, path, digest in zip(wanted, paths, _digests_of(paths), strict=True):
            if digest != self.files[name][1]:
                raise DamagedError(f"{path} is damaged, it has other bytes than were written")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own digest in it."""
    return {**content, KEY: _digest_of_json(content)}


def unsealed(content: Any, name: Path | str) -> dict[str, Any]:
    """The inverse of `sealed`.

    Raises:
        DamagedError: it is not what was sealed.
    """
    found = typed(dict[str, Any], content)
    if _digest_of_json({key: value for key, value in found.items() if key != KEY}) != found.get(KEY):
        raise DamagedError(f"{name} is not what was written")
    return {key: value for key, value in found.items() if key != KEY}


def _digest_of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests_of(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of files; a few at a time, it is the processor that limits."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="digests") as threads:
        return list(threads.map(digest_of, paths))


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
