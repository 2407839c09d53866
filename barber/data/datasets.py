"""Data sets: rows of text, from the Hugging Face hub or from a local folder.

A data set is fetched from the hub unless `data_dir` names a folder; where the hub cannot be reached, the folder `data`
is looked into. docs/measure.md has the layout of such a folder.
"""

import glob
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from barber.errors import UserError, require_counts
from barber.runtime.hub import offline_if_unreachable

log = logging.getLogger("barber")

DEFAULT_FOLDER = "data"
# More than any shard that the papers take samples of; and a machine of 16 GiB can still tokenise it.
MAX_BYTES = 2**31


class Budget:
    """How much text may be read, unpacked: a small compressed file can hold more than memory does."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def take(self, count: int, path: Path | str) -> None:
        """Count bytes that have been read.

        Raises:
            UserError: they are too many.
        """
        self.left -= count
        if self.left < 0:
            raise UserError(f"must be at least the bytes of the text, and {path} goes beyond {self.most}", "max_bytes")


class _Counted(io.RawIOBase):
    """A file whose bytes a budget is asked for as they are read."""

    def __init__(self, file: io.BufferedIOBase, path: Path, budget: Budget) -> None:
        self._file, self._path, self._budget = file, path, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto1(buffer)
        self._budget.take(count, self._path)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class Rows:
    """The rows of a data set and where they were found."""

    texts: Sequence[str]
    source: str


@dataclass(frozen=True)
class DataSet:
    """A column of one split of a data set.

    Args:
        dataset: its name at the hub, ORGANISATION/NAME.
        split: the split.
        column: the column that holds the text.
        config: which of its configurations, where it has several.
        revision: branch, tag or commit.
        files: the file of the repository that is read, instead of all.
        local: where to look in a local folder: glob patterns, the first that matches counts.
        data_dir: the local folder; None: the hub.
        first: take the first so many rows; None: all.
        max_bytes: refuse more text than that, unpacked.
    """

    dataset: str
    split: str = "train"
    column: str = "text"
    config: str | None = None
    revision: str | None = None
    files: str | None = None
    local: Sequence[str] = ()
    data_dir: str | None = None
    first: int | None = None
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        require_counts(self, "first", "max_bytes", most=None)

    def rows(self) -> Rows:
        """Read the rows.

        Raises:
            UserError: not to be had from the hub nor from a folder, or not as described.
        """
        if self.data_dir is not None:
            return self._from_folder(Path(self.data_dir), why="")
        try:
            return self._from_hub()
        except ConnectionError as error:
            log.debug("%s cannot be fetched.", self.dataset, exc_info=error)
            return self._from_folder(Path(DEFAULT_FOLDER), why="the Hugging Face hub cannot be reached and ")

    def _from_hub(self) -> Rows:
        import datasets

        datasets.disable_progress_bars()
        files = {self.split: self.files} if self.files else None
        # a part of the files does not have the number of rows that the repository announces
        verification = datasets.VerificationMode.NO_CHECKS if files else None
        try:
            with offline_if_unreachable():
                table = datasets.load_dataset(
                    self.dataset,
                    self.config,
                    data_files=files,
                    split=self.split,
                    revision=self.revision,
                    verification_mode=verification,
                )
        except ConnectionError:
            raise
        except Exception as error:  # whatever the libraries of the day raise, for HTTP and for every kind of file
            reason = " ".join(str(error).split())
            raise UserError(f"is {self.dataset}, which cannot be read from the hub: {reason}", "dataset") from error
        assert isinstance(table, datasets.Dataset)
        if self.column not in table.column_names:
            raise UserError(
                f"must be a column of {self.dataset}, not {self.column!r}; it has {', '.join(table.column_names)}",
                field="column",
            )
        texts = table[self.column][: self.first]
        budget = Budget(self.max_bytes)
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise UserError(
                    f"must hold text in every row; row {number} of {self.dataset} has {text!r}", field="column"
                )
            budget.take(len(text), self.dataset)
        return Rows(texts, self._name(f"{self.dataset} of the Hugging Face hub"))

    def _from_folder(self, folder: Path, why: str) -> Rows:
        if not self.local:
            raise UserError(f"must name the files of {self.dataset} in the folder {folder}: {why}it is empty", "local")
        path = find(folder, self.local)
        if path is None:
            wanted = " or ".join(self.local)
            where = f"{folder} has no {wanted}" if folder.is_dir() else f"there is no folder {folder}"
            raise UserError(
                f"{why}{where}; download the {self.split} split of {self.dataset} where there is a network, put it "
                f"into FOLDER/{self.local[0]} and say data_dir=FOLDER"
            )
        rows = read_column(path, self.column, Budget(self.max_bytes))
        return Rows(list(islice(rows, self.first)), self._name(str(path)))

    def _name(self, place: str) -> str:
        parts = [place, self.split + " split", f"column {self.column}"]
        return ", ".join(parts + ([f"first {self.first} rows"] if self.first else []))


def find(folder: Path, patterns: Sequence[str]) -> Path | None:
    """The first file in a folder that matches one of the patterns, in their order."""
    for pattern in patterns:
        if files := sorted(name for name in glob.glob(pattern, root_dir=folder) if (folder / name).is_file()):
            return folder / files[0]
    return None


def read_column(path: Path, column: str, budget: Budget | None = None) -> Iterator[str]:
    """A text column of a file; .txt and .raw files are one, whatever its name.

    Args:
        budget: what may be read; None: all.

    Raises:
        UserError: no such column, no text in it, or what `read_rows` raises.
    """
    for number, row in enumerate(read_rows(path, column, budget), start=1):
        if column not in row:
            raise UserError(f"must be a column of {path}, not {column!r}; it has {', '.join(row)}", field="column")
        if not isinstance(row[column], str):
            raise UserError(f"must hold text in every row; row {number} of {path} has {row[column]!r}", field="column")
        yield row[column]


def read_rows(path: Path, line_column: str = "text", budget: Budget | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file, by its name: .jsonl or .json (a row a line), .parquet, .txt (a stripped line a row) or .raw
    (a line a row, with its newline, blank ones empty: as the hub's WikiText has them); all but parquet also with .gz.

    Args:
        path: the file.
        line_column: the column that the lines of .txt and .raw are given as.
        budget: what may be read; None: all.

    Raises:
        UserError: the file is empty, cut off, not what its name says, or beyond the budget.
    """
    kind = kind_of(path)
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".txt": _stripped_lines, ".raw": _raw_lines}
    empty = True
    try:
        if kind == ".parquet":
            rows = _parquet(path, budget)
        elif kind in readers:
            rows = (row if isinstance(row, dict) else {line_column: row} for row in readers[kind](path, budget))
        else:
            known = ", ".join([*readers, ".parquet"])
            raise UserError(f"{path} is of no kind that can be read; those are {known}, and .gz of them but parquet")
        for row in rows:
            empty = False
            yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}); download it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if empty:
        raise UserError(f"{path} is empty; download it again")


def kind_of(path: Path) -> str:
    """The ending of a file's name, without .gz."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def open_text(path: Path, budget: Budget | None = None) -> TextIO:
    """A text file in UTF-8, also a gzipped one; `budget` is asked for what is read of it, unpacked."""
    opened = gzip.open if path.suffix == ".gz" else open
    file: Any = opened(path, "rb")
    if budget is not None:
        file = io.BufferedReader(_Counted(file, path, budget), 2**20)
    return io.TextIOWrapper(file, encoding="utf-8", newline="\n")  # no other line ends: texts hold stray ones


def _json_lines(path: Path, budget: Budget | None) -> Iterator[dict[str, Any]]:
    with open_text(path, budget) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} of {path} is no JSON ({error}); was the file cut off?") from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {path} must be a JSON object, not {line.strip()[:40]}")
            yield row


def _stripped_lines(path: Path, budget: Budget | None) -> Iterator[str]:
    with open_text(path, budget) as file:
        for line in file:
            yield line.strip()


def _raw_lines(path: Path, budget: Budget | None) -> Iterator[str]:
    with open_text(path, budget) as file:
        for line in file:
            yield line if line.strip() else ""


def _parquet(path: Path, budget: Budget | None) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                if budget is not None:
                    budget.take(batch.nbytes, path)
                yield from batch.to_pylist()
    except ArrowException as error:
        raise UserError(f"{path} is no whole parquet file ({' '.join(str(error).split())})") from error
