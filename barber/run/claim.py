"""The claim of a run on its folder: one run at a time, which may go on with what another one had to leave."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from shutil import rmtree
from typing import Any

from filelock import BaseFileLock

from barber.errors import UserError
from barber.model.checkpoint import MODEL
from barber.model.engine import SOURCE
from barber.run.record import FILE
from barber.runtime.files import remove, sweep, writing
from barber.runtime.locks import left_behind, locked, removed
from barber.runtime.seals import DamagedError, Seal

log = logging.getLogger("barber")

FOLDER = "checkpoint"
_FACTS = "settings.json"
_LOCK = ".lock"
_TIME = re.compile(r"^\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-\d+)?")
# What a run writes under these names is not to end in a folder, or in somebody else's file behind a link.
_FILES = (FILE, "layers.jsonl", "loss.png", "block_errors.png", "run.log", "masks.safetensors")
_FOLDERS = (".hydra", FOLDER, "model", "tasks")


class TakenError(UserError):
    """Another run has the folder."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Have a run folder for oneself inside this context, from the first write to the last.

    Raises:
        TakenError: another run has it.
        UserError: something in it is in the way.
        DiskError: it cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder / _LOCK)
    if lock is None:
        file = left_behind(folder / _LOCK)
        remedy = f"choose another{f', or delete {file} where none is' if file else ''}"
        raise TakenError(f"hydra.run.dir is the folder of a run that is still going on, {folder}; {remedy}")
    try:
        _require_kinds(folder)
        sweep(folder)
        yield
    finally:
        removed(lock)


def siblings(folder: Path) -> Iterator[Path]:
    """A folder whose name tells the time, and others for runs of the same second."""
    yield folder
    for number in count(2):
        name = _TIME.sub(rf"\g<0>-{number}", folder.name)
        yield folder.with_name(name if name != folder.name else f"{name}-{number}")


def begin(folder: Path, facts: dict[str, Any], may_resume: bool) -> Path | None:
    """Make the checkpoint folder of a run that owns its folder, or take over that of a run that was interrupted.

    Args:
        folder: of the run.
        facts: what the finished layers depend on: of the interrupted run they have to be the same.
        may_resume: whether to go on with an interrupted run: that of this folder, or of one beside it whose name
            differs in nothing but the time that it begins with.

    Returns the folder that an interrupted run's layers came from.

    Raises:
        UserError: the folder holds an unfinished run that must not be gone on with.
        DiskError: it cannot be written.
    """
    own = folder / FOLDER
    facts = json.loads(json.dumps(facts))
    with writing(own):
        if own.exists():
            if _goes_on(folder, facts, may_resume):
                sweep(own)
                return folder
            clear(folder)
        for other in _of_the_same_name(folder) if may_resume else ():
            if _taken_over(other, own, facts):
                return other.parent
        own.mkdir(exist_ok=True)
    Seal(facts).write(own / _FACTS)
    return None


def holds_layers(folder: Path) -> bool:
    """Whether a run folder holds finished layers of a run that was interrupted."""
    return any((folder / FOLDER).glob("layer-*.json"))


def has_leftovers(folder: Path) -> bool:
    """Whether a run that was killed at its very end has left something that its owner would remove."""
    return any((folder / name).exists() for name in (FOLDER, SOURCE, _LOCK))


def clear(folder: Path) -> None:
    """Remove what checkpoints consist of from a run folder, their folder if that was all, and a model made for it."""
    own = folder / FOLDER
    rmtree(folder / SOURCE, ignore_errors=True)
    # Where nothing says any more what the layers are, nobody goes on with them.
    for pattern in (_FACTS, "layer-*", "pruned-*", "activations-*", ".*.unfinished", MODEL, "lock"):
        for file in own.glob(pattern):
            remove(file)
    with suppress(OSError):
        own.rmdir()


def _goes_on(folder: Path, facts: dict[str, Any], may_resume: bool) -> bool:
    """Whether a run folder holds layers to go on with; not if the run came to nothing, or nobody knows what they are.

    Raises:
        UserError: it does, and they must not be gone on with.
    """
    there = _facts_in(folder / FOLDER)
    if there is None or not holds_layers(folder):
        if there is None and holds_layers(folder):
            log.warning("%s is damaged or not there; all layers are computed again.", folder / FOLDER / _FACTS)
        return False
    if not may_resume:
        raise UserError("hydra.run.dir holds an unfinished run; resume=auto goes on with it, or choose another")
    if differing := _differing(there, facts):
        raise UserError(
            f"hydra.run.dir holds an unfinished run with other settings ({differing}); "
            "give the same ones, or choose another folder"
        )
    return True


def _taken_over(other: Path, own: Path, facts: dict[str, Any]) -> bool:
    """Move another run's layers here; False where they are others, or another run has them."""

    def fits() -> bool:
        return _facts_in(other) == facts and holds_layers(other.parent)

    if not fits() or (lock := _lock(other.parent)) is None:
        return False
    try:
        if fits():  # still, now that nobody else can move them
            sweep(other)
            other.rename(own)
            return True
    except OSError:
        pass
    finally:
        removed(lock)
    return False


def _of_the_same_name(folder: Path) -> list[Path]:
    """The checkpoint folders of runs that were begun at other times, the latest first."""
    own = _TIME.sub("", folder.name)
    if own == folder.name:
        return []
    others = [other for other in folder.parent.glob(f"*/{FOLDER}") if _TIME.sub("", other.parent.name) == own]
    return sorted(others, reverse=True)


def _facts_in(folder: Path) -> dict[str, Any] | None:
    try:
        found = Seal.read(folder / _FACTS).content
    except DamagedError:
        return None
    return found if isinstance(found, dict) else None


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs, by full key: `rebuild.barber.alpha: 0.1 there, 0.2 here`."""
    left, right = _flat(there), _flat(here)
    keys = sorted(key for key in left | right if left.get(key) != right.get(key))
    return ", ".join(f"{key}: {left.get(key)} there, {right.get(key)} here" for key in keys)


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {key: node}
    flat: dict[str, Any] = {}
    for name, part in node.items():
        flat |= _flat(part, f"{key}.{name}" if key else name)
    return flat


def _require_kinds(folder: Path) -> None:
    for names, kind, is_one in ((_FILES, "file", Path.is_file), (_FOLDERS, "folder", Path.is_dir)):
        for path in (folder / name for name in names):
            if path.is_symlink() or (path.exists() and not is_one(path)):
                raise UserError(
                    f"hydra.run.dir must hold a {kind} of its own or nothing as {path.name}, not what is {path}; "
                    "remove it, or choose another"
                )


def _lock(folder: Path) -> BaseFileLock | None:
    try:
        return locked(folder / _LOCK)
    except OSError:
        return None
