"""The one place where records are read: whatever version wrote them, they come as a `RunRecord` or as a sentence."""

import json
from pathlib import Path
from typing import Any

from barber.errors import UserError
from barber.run.record import FILE, VERSION, RunRecord
from barber.runtime.plain import typed
from barber.runtime.seals import KEY, DamagedError, digest_of, unsealed


class NewerRecordError(UserError):
    """The record was written by a later version of the package."""


def read(run: Path) -> RunRecord:
    """The record of a run, given by its folder or by its file.

    Raises:
        UserError: there is none, or what is there is not one.
        NewerRecordError: it has a form that is not known yet.
    """
    file = run / FILE if run.is_dir() else run
    try:
        content = json.loads(file.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise UserError(f"{run} must be the folder of a run, with a {FILE}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(str(file), error) from error
    try:
        record = from_json(content, str(file))
    except NewerRecordError:
        _require_intact(content, file)
        raise
    _require_intact(content, file)
    return record


def from_json(content: Any, source: str) -> RunRecord:
    """The record that a JSON file, or a line of one, holds; errors call it `source`.

    Raises:
        UserError, NewerRecordError: as for `read`.
    """
    try:
        known = typed(dict[str, Any], content)
        written = typed(int, known.get("version", 1), "version")
        if written < 1:
            raise UserError(f"must be 1 at least, not {written}", "version")
        if written <= VERSION:
            return typed(RunRecord, (_from_version_1(known) if written == 1 else known) | {"version": VERSION})
    except UserError as error:
        raise _damaged(source, error) from error
    raise NewerRecordError(
        f"{source} must be a record of version {VERSION} at most, not {written}: upgrade llm-barber to read it"
    )


def require_file(record: RunRecord, file: Path) -> None:
    """Compare a file beside a record with its digest, if the record has one and the file is there.

    Raises:
        UserError: it is damaged.
    """
    known = record.digests.get(file.name)
    try:
        if known in (None, digest_of(file)):
            return
    except FileNotFoundError:
        return
    except OSError:
        pass
    raise UserError(f"{file} must be what the run wrote, and is damaged")


def successful(folder: Path) -> RunRecord | None:
    """The record of the run that succeeded in a folder; None if there is none.

    Raises:
        NewerRecordError: nobody can say, and what is there is not to be done over.
    """
    try:
        record = read(folder)
    except NewerRecordError:
        raise
    except UserError:
        return None
    return record if record.status == "success" else None


def is_unfinished(folder: Path, digest: str) -> bool:
    """Whether a run with a config of this digest has begun in a folder and has not succeeded."""
    try:
        record = read(folder)
    except UserError:
        return False
    return record.status != "success" and record.digest == digest


def folder_of_job(sweep: Path, name: str, digest: str) -> Path:
    """Where a job of a sweep is, or is to go: found by its digest alone, finished ones first, else NAME-DIGEST.

    Args:
        digest: of the job's config, as many characters of it as folders' names have.
    """
    own = sweep / f"{name}-{digest}"
    there = sorted(folder for folder in sweep.glob(f"*-{digest}") if folder.is_dir())
    return next((folder for folder in there if _is_taken(folder)), own if own in there or not there else there[0])


def _require_intact(content: dict[str, Any], file: Path) -> None:
    """Compare a record with its digest, which those in files have since version 3."""
    if KEY in content or content.get("version") == VERSION:
        try:
            unsealed(content, "what it holds")
        except DamagedError as error:
            raise _damaged(str(file), error) from error


def _is_taken(folder: Path) -> bool:
    try:
        return successful(folder) is not None
    except NewerRecordError:  # which the job itself can say, and the composing of a config cannot
        return True


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """What the records without a version have otherwise, in their several forms."""
    changed: dict[str, Any] = {}
    match content.get("config"):
        case {"rebuild": {"_target_": str(target)} as step, **others}:  # before there were several steps
            changed["config"] = {**others, "rebuild": {target.rpartition(".")[2].lower(): step}}
    match content.get("seeds"):
        case dict(seeds):  # empty at first, and without the calibration's where there is none
            changed["seeds"] = {"calibration": None, **seeds} if seeds else None
    match content.get("initial"):
        case "kept" | "computed" as how:
            changed["initial"] = {"known": how == "kept", "seconds": None}
    return content | changed


def _damaged(source: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{source} must be the record of a run, and is damaged or none: {reason}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
