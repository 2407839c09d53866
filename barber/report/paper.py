"""Published figures, from paper.yaml."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from barber.report.errors import ReportError
from barber.report.points import DENSE, Point
from barber.report.records import Protocol, pattern_name

FILE = Path(__file__).parent / "paper.yaml"


@dataclass(frozen=True)
class Source:
    """Where figures were published, and on what they were measured there.

    Args:
        max_windows: the first so many windows; None: all.
        calibration: as in `Run.calibration`; None: not stated.
    """

    title: str
    max_windows: int | None = None
    calibration: str | None = None


@dataclass(frozen=True)
class Published:
    """A published perplexity.

    Args:
        pattern: as in `Run.pattern`.
        value: None: it is not known here, and the note says why.
        seqlen: tokens a window; None: not stated.
    """

    model: str
    method: str
    pattern: str
    text: str
    seqlen: int | None
    value: float | None
    source: Source
    note: str | None = None

    def same_protocol(self, protocol: Protocol) -> bool:
        """Whether a measured figure can be compared with this one."""
        windows = (protocol.stride, protocol.bos, protocol.first_windows)
        return protocol.seqlen == self.seqlen and windows == (self.seqlen, False, self.source.max_windows)


@dataclass(frozen=True)
class Paper:
    """All published figures, and the names of models by what configs call them."""

    aliases: dict[str, str]
    figures: tuple[Published, ...]

    def beside(self, point: Point) -> Published | None:
        """The figure for a point's model, pattern and method; of several, the one with its protocol."""
        found = [
            one
            for one in self.figures
            if (one.model, one.method) == (point.model, point.method) and (point.dense or one.pattern == point.pattern)
        ]
        return min(found, key=lambda one: (not _comparable(one, point), one.value is None), default=None)


def comparable(published: Published, point: Point) -> bool:
    """Whether point and published figure have the protocol in common, too."""
    return published.value is not None and _comparable(published, point)


def load(file: Path = FILE) -> Paper:
    """Read and check the file.

    Raises:
        ReportError: a row is not what it has to be.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ReportError(f"{file.name} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not {"sources", "models", "figures"} <= content.keys():
        raise ReportError(f"{file.name} has to have sources, models and figures.")
    sources = {name: _source(name, one, file) for name, one in content["sources"].items()}
    aliases = {path: model for model, paths in content["models"].items() for path in paths}
    figures = [_figure(row, sources, f"figures[{i}] of {file.name}") for i, row in enumerate(content["figures"])]
    return Paper(aliases, tuple(figures))


def _comparable(published: Published, point: Point) -> bool:
    return published.text in point.protocols and published.same_protocol(point.protocols[published.text])


def _source(name: str, node: Any, file: Path) -> Source:
    where = f"sources.{name} of {file.name}"
    _check_keys(node, {"title"}, {field.name for field in fields(Source)}, where)
    return Source(**node)


def _figure(row: Any, sources: dict[str, Source], where: str) -> Published:
    required = {"model", "method", "seqlen", "value", "source"}
    _check_keys(row, required, required | {"pattern", "sparsity", "text", "note"}, where)
    if row["source"] not in sources:
        raise ReportError(f"{where}: source {row['source']!r} is none of {', '.join(sources)}.")
    for key, kind in (("seqlen", int), ("value", int | float)):
        if not (row[key] is None or (isinstance(row[key], kind) and not isinstance(row[key], bool) and row[key] > 0)):
            raise ReportError(f"{where}: {key} has to be a positive number or null, not {row[key]!r}.")
    if row["value"] is None and not row.get("note"):
        raise ReportError(f"{where}: a value of null needs a note that says why.")
    return Published(
        model=str(row["model"]),
        method=str(row["method"]),
        pattern="" if row["method"] == DENSE else _pattern(row, where),
        text=row.get("text", "wikitext2"),
        seqlen=row["seqlen"],
        value=row["value"],
        source=sources[row["source"]],
        note=row.get("note"),
    )


def _pattern(row: dict[str, Any], where: str) -> str:
    pattern, sparsity = row.get("pattern"), row.get("sparsity")
    if pattern == "unstructured":
        if not isinstance(sparsity, float) or not 0 < sparsity < 1:
            raise ReportError(f"{where}: sparsity has to be between 0 and 1, not {sparsity!r}.")
        return pattern_name(sparsity)
    if not isinstance(pattern, str) or not all(part.isdigit() for part in pattern.split(":")) or ":" not in pattern:
        # YAML reads 2:4 without quotes as the number 124.
        raise ReportError(f'{where}: pattern has to be unstructured or N:M in quotes ("2:4"), not {pattern!r}.')
    return pattern


def _check_keys(node: Any, required: Iterable[str], known: Iterable[str], where: str) -> None:
    if not isinstance(node, dict):
        raise ReportError(f"{where} has to be a mapping, not {node!r}.")
    if missing := sorted(set(required) - node.keys()):
        raise ReportError(f"{where} lacks {', '.join(missing)}.")
    if unknown := sorted(map(str, node.keys() - set(known))):
        raise ReportError(f"{where} has unknown keys: {', '.join(unknown)}.")
