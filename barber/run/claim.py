"""The claim of a run on its folder: one run at a time, which may go on with what another one had to leave."""

import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from barber.errors import UserError
from barber.model.checkpoint import MODEL
from barber.runtime.files import remove, sweep
from barber.runtime.locks import locked
from barber.runtime.seals import DamagedError, Seal

log = logging.getLogger("barber")

FOLDER = "checkpoint"
_FACTS = "settings.json"
_LOCK = "lock"
_TIME = re.compile(r"^\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")


def begin(folder: Path, facts: dict[str, Any], may_resume: bool) -> tuple[BaseFileLock, Path | None]:
    """Make a run's checkpoint folder, or take over that of a run that was interrupted.

    Args:
        folder: of the run.
        facts: what the finished layers depend on: of the interrupted run they have to be the same.
        may_resume: whether to go on with an interrupted run: that of this folder, or of one beside it whose name
            differs in nothing but the time that it begins with.

    Returns the lock, to be held as long as the run goes on, and the folder that an interrupted run's layers came from.

    Raises:
        UserError: the folder holds an unfinished run that must not be gone on with, or one that is still going on.
    """
    own = folder / FOLDER
    facts = json.loads(json.dumps(facts))
    if own.exists():
        lock = _locked(folder)
        try:
            if _goes_on(folder, facts, may_resume):
                sweep(own)
                return lock, folder
            _clear(own)
        except BaseException:
            lock.release()
            raise
        lock.release()
    for other in _of_the_same_name(folder) if may_resume else ():
        if (taken := _taken_over(other, own, facts)) is not None:
            return taken, other.parent
    own.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    Seal(facts).write(own / _FACTS)
    return lock, None


def holds_layers(folder: Path) -> bool:
    """Whether a run folder holds finished layers of a run that was interrupted."""
    return any((folder / FOLDER).glob("layer-*.json"))


def require_idle(folder: Path) -> None:
    """Refuse a run folder in which a run goes on.

    Raises:
        UserError: one does.
    """
    if (folder / FOLDER / _LOCK).exists():
        _locked(folder).release()


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


def _taken_over(other: Path, own: Path, facts: dict[str, Any]) -> BaseFileLock | None:
    """Move another run's layers here; returns their lock, or None where they are others or another run has them."""

    def fits() -> bool:
        return _facts_in(other) == facts and holds_layers(other.parent)

    if not fits() or (lock := _lock(other)) is None:
        return None
    try:
        if fits():  # still, now that nobody else can move them
            sweep(other)
            other.rename(own)
            return lock
    except OSError:
        pass
    lock.release()
    return None


def _clear(own: Path) -> None:
    """Remove what checkpoints consist of, and the folder if that was all."""
    for pattern in ("layer-*", "pruned-*", "activations-*", ".*.unfinished", MODEL, _FACTS, _LOCK):
        for file in own.glob(pattern):
            remove(file)
    with suppress(OSError):
        own.rmdir()


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


def _locked(folder: Path) -> BaseFileLock:
    lock = _lock(folder / FOLDER)
    if lock is None:
        raise UserError(f"hydra.run.dir is the folder of a run that is still going on, {folder}; choose another")
    return lock


def _lock(folder: Path) -> BaseFileLock | None:
    try:
        return locked(folder / _LOCK)
    except OSError:
        return None
