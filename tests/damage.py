"""What disks, and people, do to files."""

import os
from collections.abc import Callable
from pathlib import Path

from barber.runtime.files import remove


def flip(file: Path, place: float = 0.7) -> None:
    """Turn a bit over, by default one of the numbers of a safetensors file; size and time stay."""
    content, times = bytearray(file.read_bytes()), file.stat()
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _folder(file: Path) -> None:
    remove(file)
    file.mkdir()
    (file / "something").write_text("else")


def _link(file: Path) -> None:
    remove(file)
    file.symlink_to(file.with_name("nowhere"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "a bit in the head": lambda file: flip(file, 0.02),
    "the last bit": lambda file: flip(file, 0.999999),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one byte less": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "one byte more": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "nothing": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "no object": lambda file: file.write_text("[]"),
    "an empty object": lambda file: file.write_text("{}"),
    "a folder": _folder,
    "a link to nowhere": _link,
    "gone": remove,
}
