"""Where records come from: the folders of runs, and tables, which hold the records of many runs in one small file.

A table NAME.jsonl.gz stands for a folder NAME of runs: a line of JSON a run, with its name under `run` and what is in
its record.json, but for rows a linear and what is of use in the run's folder only (`python -m experiments.pack`).
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from barber.errors import UserError
from barber.report.errors import ReportError
from barber.run import reading
from barber.run.reading import from_json
from barber.run.record import FILE
from barber.runtime.files import written_whole

TABLE = ".jsonl.gz"
# Rows a linear, which are most of a record; the folder's other files; where the code of a failed run stood.
_LEFT_OUT = frozenset(["linears", "files", "digests", "traceback"])

Record = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A run that was found.

    Args:
        name: of its folder or in its table, relative to the place that was asked for; of several places, with theirs
            in front.
        record: None: it cannot be read.
        folder: None: the run is one of a table.
        error: why the record cannot be read.
    """

    name: str
    record: Record | None = None
    folder: Path | None = None
    error: str = ""


def find(places: Sequence[Path]) -> list[Found]:
    """The runs in folders and tables, each once.

    Raises:
        ReportError: there are none, or a place is no such thing.
    """
    files: dict[Path, tuple[Path, PurePath]] = {}
    for place in places:
        prefix = PurePath(without_ending(place.resolve()).name if len(places) > 1 else "")
        for file in _files(place):
            inner = PurePath() if file == place else _stands_for(file).relative_to(place)
            files.setdefault(file.resolve(), (file, prefix / inner))
    if not files:
        raise ReportError(f"There is no {FILE} and no table (*{TABLE}) below {', '.join(map(str, places))}.")
    return [run for file, name in files.values() for run in _runs(file, name)]


def one(run: str) -> Record:
    """The record of a run, given by its folder or as TABLE#NAME.

    Raises:
        ReportError: there is none, or it cannot be read.
    """
    file, mark, name = run.rpartition("#")
    if mark and file.endswith(TABLE):
        records = read(Path(file))
        if name not in records:
            raise ReportError(f"{file} has no run {name!r}; there is {', '.join(records)}.")
        return records[name]
    if run.endswith(TABLE):
        raise ReportError(f"{run} is a table: give a run of it as {run}#NAME; there is {', '.join(read(Path(run)))}.")
    return _read_one(Path(run) / FILE)


def read(table: Path) -> dict[str, Record]:
    """The records of a table by the names of their runs.

    Raises:
        ReportError: it is none.
    """
    records: dict[str, Record] = {}
    try:
        with gzip.open(table, "rt", encoding="utf-8") as lines:
            for line in lines:
                content = json.loads(line)
                name = content.pop("run")
                records[name] = from_json(content, f"{table}#{name}").content()
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zlib.error) as error:
        raise ReportError(f"{table} cannot be read as a table of records: {error}.") from error
    return records


def write(table: Path, records: Mapping[str, Record]) -> None:
    """Write a table, whole or not at all; the same bytes for the same records, by the names of their runs."""
    lines = [
        json.dumps(
            {"run": name} | {key: value for key, value in records[name].items() if key not in _LEFT_OUT},
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
        for name in sorted(records)
    ]
    with written_whole(table) as unfinished:
        unfinished.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def _files(place: Path) -> list[Path]:
    if not place.is_file():
        return sorted([*place.rglob(FILE), *place.rglob(f"*{TABLE}")])
    if not place.name.endswith(TABLE):
        raise ReportError(f"{place} is neither a folder nor a table (*{TABLE}).")
    return [place]


def without_ending(place: Path) -> Path:
    """The folder that a table stands for; a folder as it is."""
    return place.with_name(place.name.removesuffix(TABLE))


def _stands_for(file: Path) -> Path:
    """The folder of a record, or the one that a table stands for."""
    return file.parent if file.name == FILE else without_ending(file)


def _runs(file: Path, name: PurePath) -> Iterator[Found]:
    alone = name.as_posix() if name.parts else _stands_for(file.resolve()).name
    try:
        if file.name == FILE:
            yield Found(alone, _read_one(file), file.parent)
        else:
            yield from [Found((name / run).as_posix(), record) for run, record in read(file).items()]
    except ReportError as error:
        yield Found(alone, error=str(error))


def _read_one(file: Path) -> Record:
    try:
        record = reading.read(file)
        reading.require_file(record, file.parent / "layers.jsonl")
    except UserError as error:
        raise ReportError(str(error)) from error
    return record.content()
