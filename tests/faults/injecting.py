"""Faults from inside: a process's own calls that write are counted; one of them fails, or is the last of the process.

No tracer and no root: the functions of `os`, `open` and safetensors are wrapped, and what is written through a Python
file passes through a raw file of our own, so that a write may be cut in the middle.
"""

import builtins
import errno
import io
import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from barber.run import notes
from barber.runtime.files import written_whole
from tests.cli.running import Result, barber
from tests.processes import Outcome, launch

DISKS = {"full": errno.ENOSPC, "broken": errno.EIO, "denied": errno.EACCES}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
_OF_PATHS = ("mkdir", "unlink", "remove", "rmdir", "chmod")
_OF_TWO_PATHS = ("rename", "replace", "link", "symlink")
_OF_DESCRIPTORS = ("fsync", "pwrite", "ftruncate")


@dataclass(frozen=True)
class Fault:
    """What happens at a call that writes.

    Args:
        at: number of the call, from 0; beyond the last one nothing happens.
        kind: of DISKS or SIGNALS.
        stays: whether every later call that needs room fails, too.
        after: in place of a call, so many seconds.
    """

    at: int
    kind: str
    stays: bool = False
    after: float | None = None

    def __str__(self) -> str:
        if self.after is not None:
            return f"{self.kind} after {self.after:.3f} s"
        return f"{self.kind} at {self.at}{' and on' if self.stays else ''}"


class _Faults:
    def __init__(self, folders: list[Path], fault: Fault | None, log: Path) -> None:
        self._folders = [f"{os.path.realpath(folder)}/" for folder in folders]
        self._fault, self._calls = fault, 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._pid = os.getpid()

    def concerns(self, path: Any, folder: int | None = None) -> str | None:
        """The path, if it is in one of the folders."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}") if os.path.exists(f"/proc/self/fd/{path}") else ""
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd(), path)
        return name if name.startswith(tuple(self._folders)) and os.getpid() == self._pid else None

    def meet(self, call: str, path: str, half: Callable[[], Any] | None = None) -> None:
        """Count a call, and let happen what is to happen; `half` does half of it."""
        number, fault = self._calls, self._fault
        self._calls += 1
        os.write(self._log, f"{number} {call} {path}\n".encode())
        if fault is None or number < fault.at or (number > fault.at and not fault.stays):
            return
        if fault.stays and call in ("unlink", "remove", "rmdir", "chmod", "rename"):
            return  # none of these needs room
        if half is not None and fault.kind in ("kill", "full"):
            half()
        if fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])
            return
        reason = os.strerror(DISKS[fault.kind])
        if call == "serialize_file":
            raise SafetensorError(f"Error while serializing: I/O error: {reason} (os error {DISKS[fault.kind]})")
        if call == "connect":
            raise sqlite3.OperationalError("unable to open database file")
        # As the kernel has it, a call on a descriptor knows no name.
        raise OSError(DISKS[fault.kind], reason, *([] if call in ("write", *_OF_DESCRIPTORS) else [path]))


def inject(folders: list[Path], fault: Fault | None, log: Path) -> None:
    """Wrap the calls of this process that write below some folders; what they were goes to `log`, a line each."""
    if fault is not None and fault.after is not None:
        clock = threading.Timer(fault.after, os.kill, (os.getpid(), SIGNALS[fault.kind]))
        clock.daemon = True
        clock.start()
        fault = None
    faults = _Faults(folders, fault, log)

    def wrap(module: Any, name: str, place: int) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            folder = named.get("dir_fd", named.get("dst_dir_fd"))
            if (path := faults.concerns(os.fspath(arguments[place]) if place != -1 else arguments[0], folder)) is None:
                return original(*arguments, **named)
            faults.meet(name, path)
            return original(*arguments, **named)

        setattr(module, name, call)

    for name in _OF_PATHS:
        wrap(os, name, 0)
    for name in _OF_TWO_PATHS:
        wrap(os, name, 1)
    for name in _OF_DESCRIPTORS:
        wrap(os, name, -1)
    wrap(sqlite3, "connect", 0)
    os_open, io_open, serialize = os.open, io.open, safetensors.torch.serialize_file

    def open_descriptor(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and (where := faults.concerns(os.fspath(path), named.get("dir_fd"))) is not None:
            faults.meet("open", where)
        return os_open(path, flags, *rest, **named)

    class Raw(io.FileIO):
        def write(self, content: Any) -> int:
            half = bytes(content)[: len(content) // 2]
            path = faults.concerns(self.fileno())
            if path is not None:
                faults.meet("write", path, lambda: io.FileIO.write(self, half))
            return super().write(content)

    def open_file(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *rest: Any, **named: Any
    ) -> Any:
        is_path = not isinstance(file, int) and set(mode) & set("wax+")
        if not is_path or (where := faults.concerns(os.fspath(file))) is None:
            return io_open(file, mode, buffering, encoding, *rest, **named)
        opener = named.pop("opener", None)
        if opener is None:
            faults.meet("open", where)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), opener=opener)
        buffered = raw if buffering == 0 else io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, *rest, line_buffering=buffering == 1, **named)

    def serialize_file(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
        def half() -> None:
            serialize(tensors, path, *rest, **named)
            os.truncate(path, os.stat(path).st_size // 2)

        if (where := faults.concerns(os.fspath(path))) is not None:
            faults.meet("serialize_file", where, half)
        serialize(tensors, path, *rest, **named)

    os.open, io.open, builtins.open = open_descriptor, open_file, open_file  # type: ignore[assignment]
    safetensors.torch.serialize_file = serialize_file


def _attempt(arguments: list[str], folders: list[Path], fault: Fault | None, log: Path, folder: Path) -> Result:
    os.chdir(folder)
    # Pictures take as long as all the rest.
    notes.plot_losses = _draw_nothing
    inject(folders, fault, log)
    return barber(*arguments)


def _draw_nothing(blocks: object, name: str, path: Path) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_bytes(b"picture")


def attempt(arguments: list[str], fault: Fault | None, folder: Path, *more: Path) -> Outcome:
    """Run `barber ARGUMENTS` in a process of its own, in `folder`, with a fault among its writes there."""
    said = folder.with_name(f"{folder.name}-said")
    folder.mkdir(exist_ok=True)
    said.mkdir(exist_ok=True)
    (outcome,) = launch(_attempt, arguments, [folder, *more], fault, said / "calls", folder, size=1, folder=said)
    return outcome


def calls_of(folder: Path) -> list[str]:
    """The calls of the last attempt in a folder, CALL PATH each."""
    lines = (folder.with_name(f"{folder.name}-said") / "calls").read_text().splitlines()
    return [line.partition(" ")[2].replace(str(folder), ".") for line in lines]
