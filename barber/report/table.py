"""The table of a report: which columns, what stands in them, and every reason not to compare a figure with another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from barber.report.paper import Paper, Published, comparable
from barber.report.points import Mean, Point, majority, varying
from barber.report.records import Broken, Protocol, Run

SEQLEN, CALIBRATION = 2048, "128 x 2048 c4"
_SHORT = {
    "rebuild.barber.alpha": "alpha",
    "rebuild.barber.granularity": "granularity",
    "rebuild.barber.metric": "metric",
    "rebuild.barber.nm_exchange": "nm_exchange",
    "rebuild.barber.retain_reconstruction": "retain_reconstruction",
    "calibration.nsamples": "nsamples",
    "calibration.seqlen": "calibration seqlen",
}


@dataclass(frozen=True)
class Column:
    """A column: its title, whether figures stand in it, and whether they are what was measured of the model."""

    title: str
    numeric: bool = True
    measured: bool = False


@dataclass(frozen=True)
class Cell:
    """What stands in a row under a column.

    Args:
        text: for people.
        mean: the figure behind the text, for sorting and CSV.
        notes: footnotes.
        hint: where a published figure comes from.
    """

    text: str = ""
    mean: Mean | None = None
    best: bool = False
    notes: tuple[str, ...] = ()
    hint: str = ""


@dataclass(frozen=True)
class Row:
    """A point and its cells, by column title."""

    point: Point
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """Everything that the formats write."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    warnings: Sequence[str] = ()
    broken: Sequence[Broken] = ()
    notes: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        cells = (row.cells[column.title] for row in self.rows for column in self.columns)
        object.__setattr__(self, "notes", list(dict.fromkeys(note for cell in cells for note in cell.notes)))

    @property
    def legend(self) -> list[str]:
        """What ± and bold mean, where they occur."""
        cells = [row.cells[column.title] for row in self.rows for column in self.columns]
        means = [cell.mean for cell in cells if cell.mean]
        told = {
            "± is one standard error, over windows (perplexity) or documents (accuracy)": any(m.error for m in means),
            "± with n= is one sample standard deviation over n seeds": any(mean.n > 1 for mean in means),
            "Bold: the best of a model, pattern and protocol; the dense model does not take part": any(
                cell.best for cell in cells
            ),
        }
        return [f"{sentence}." for sentence, occurs in told.items() if occurs]

    def marks(self, cell: Cell) -> str:
        """The letters of a cell's footnotes, `a, c`."""
        return ", ".join(mark for mark, _ in self.notes_of(cell))

    def notes_of(self, cell: Cell) -> list[tuple[str, str]]:
        """A cell's footnotes with their letters."""
        return [(letter(index), self.notes[index]) for index in sorted(map(self.notes.index, cell.notes))]


def build(points: Sequence[Point], runs: Sequence[Run], broken: Sequence[Broken], paper: Paper) -> Table:
    """The table of all points; runs that none of them holds are listed below it."""
    usual = majority(points)
    writers = {**_identity(points, runs), **_figures(points, usual, paper)}
    rows = [Row(point, {column.title: write(point) for column, write in writers.items()}) for point in points]
    return Table(list(writers), rows, list(_warnings(points, usual)), [*broken, *_left_out(points, runs)])


Writers = dict[Column, Callable[[Point], Cell]]


def _identity(points: Sequence[Point], runs: Sequence[Run]) -> Writers:
    """The columns that say what a row is of."""
    writers: Writers = {
        Column("model", numeric=False): lambda point: Cell(point.model),
        Column("method", numeric=False): _method,
        Column("pattern", numeric=False): lambda point: Cell(point.pattern),
    }
    for key in varying(runs):
        if any(point.settings.get(key) is not None for point in points):
            writers[_column(key, points)] = partial(_setting, key)
    if len({run.seed for point in points for run in point.runs if not point.dense}) > 1:
        writers[Column("seeds", numeric=False)] = _seeds
    return writers


def _figures(points: Sequence[Point], usual: Mapping[tuple[str, str], Protocol], paper: Paper) -> Writers:
    """The columns of what was measured and published, as far as there is something."""
    texts = _texts(points)
    best = _best(points, texts)
    writers: Writers = {
        Column(f"perplexity, {text}", measured=True): partial(_perplexity, text, best, usual) for text in texts
    }
    if any(point.accuracy for point in points):
        writers[Column("zero-shot acc (%)", measured=True)] = partial(_accuracy, best, points)
    if any(paper.beside(point) for point in points):
        writers[Column("published")] = partial(_published, paper)
        writers[Column("difference (%)")] = partial(_difference, paper)
    if any(point.walk for point in points):
        writers[Column("walk (s)")] = _walk
    if any(point.memory for point in points):
        writers[Column("peak memory (GiB)")] = _memory
    return writers


def letter(index: int) -> str:
    """a, b, ... z, aa, ab, ... for a footnote."""
    return (letter(index // 26 - 1) if index >= 26 else "") + "abcdefghijklmnopqrstuvwxyz"[index % 26]


def short(key: str) -> str:
    """What tables call a setting."""
    return _SHORT.get(key, key)


def primary_text(points: Sequence[Point]) -> str | None:
    """The text that most points were measured on; WikiText-2 where it is among them."""
    texts = _texts(points)
    return max(
        texts, key=lambda text: (sum(text in point.perplexity for point in points), -texts.index(text)), default=None
    )


def _texts(points: Sequence[Point]) -> list[str]:
    """wikitext2 first, the others as they come."""
    texts = dict.fromkeys(text for point in points for text in point.perplexity)
    return sorted(texts, key=lambda text: text != "wikitext2")


def _column(key: str, points: Sequence[Point]) -> Column:
    values = [point.settings.get(key) for point in points]
    return Column(short(key), numeric=all(value is None or _is_number(value) for value in values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _setting(key: str, point: Point) -> Cell:
    value = point.settings.get(key)
    if value is None:
        return Cell()
    return Cell(f"{value:g}", Mean((float(value),))) if _is_number(value) else Cell(str(value))


def _seeds(point: Point) -> Cell:
    return Cell("" if point.dense else ", ".join(sorted(run.seed for run in point.runs)))


def _method(point: Point) -> Cell:
    """The method, and what sets its calibration or walk, or the dense model, apart from the papers'."""
    notes = []
    if point.dense and (share := round(point.runs[0].dense_zeros or 0, 4)):
        notes.append(f"{share:.2%} of the dense model's weights are zeros")
    if not point.dense:
        for run in point.runs:
            no_data = point.method == "Magnitude"
            if run.calibration and run.calibration != CALIBRATION and not no_data:
                notes.append(f"calibrated on {run.calibration}, not on {CALIBRATION}")
            if run.config.get("schedule", "paper") != "paper" and "+" in point.method:
                notes.append(f"schedule={run.config['schedule']}, not the paper's")
    return Cell(point.method, notes=tuple(dict.fromkeys(notes)))


def _perplexity(text: str, best: set[tuple[int, str]], usual: Mapping[tuple[str, str], Protocol], point: Point) -> Cell:
    mean = point.perplexity.get(text)
    if mean is None:
        return Cell()
    protocol = point.protocols[text]
    notes = list(_limits(protocol, text))
    if protocol != (most := usual[point.model, text]):
        notes.insert(0, f"NOT THE PROTOCOL OF MOST ROWS: {protocol} instead of {most}")
    return Cell(with_std(mean, ".2f"), mean, (id(point), text) in best, tuple(notes))


def _limits(protocol: Protocol, text: str) -> Iterator[str]:
    """What sets a perplexity apart from published ones."""
    if protocol.first_windows is not None and (text, protocol.first_windows) != ("c4", 256):  # the papers' own limit
        yield f"{text}: only the first {protocol.first_windows} windows (max_windows)"
    if protocol.seqlen != SEQLEN:
        yield f"{text}: windows of {protocol.seqlen} tokens, not {SEQLEN}"
    if protocol.stride != protocol.seqlen - protocol.bos:  # a BOS token takes the place of one of the text
        yield f"{text}: overlapping windows, stride {protocol.stride}"
    if protocol.bos:
        yield f"{text}: windows begin with BOS"


def _accuracy(best: set[tuple[int, str]], points: Sequence[Point], point: Point) -> Cell:
    if point.accuracy is None:
        return Cell()
    notes = []
    if limit := point.zero_shot.get("limit"):
        notes.append(f"zero-shot: only the first {limit} documents of every task (limit)")
    measured = [_tasks(other) for other in points if other.accuracy and other.model == point.model]
    usual = max(measured, key=measured.count)
    if _tasks(point) != usual:
        notes.insert(0, f"NOT THE PROTOCOL OF MOST ROWS: zero-shot {_tasks(point)} instead of {usual}")
    percent = in_percent(point.accuracy)
    return Cell(with_std(percent, ".2f"), percent, (id(point), "zero-shot") in best, tuple(notes))


def _tasks(point: Point) -> str:
    limit = point.zero_shot.get("limit")
    tasks = ", ".join(point.zero_shot.get("mean_of") or point.zero_shot.get("tasks") or [])
    return f"mean of {tasks}" + (f", {limit} documents each" if limit else "")


def _published(paper: Paper, point: Point) -> Cell:
    published = paper.beside(point)
    if published is None:
        return Cell()
    source = published.source.title + (f"; {published.note}" if published.note else "")
    if published.value is None:
        return Cell("–", notes=(f"no published figure: {source}",), hint=source)
    note = () if comparable(published, point) else (f"other protocol: {source}, {_published_protocol(published)}",)
    mean = Mean((published.value,))
    return Cell(f"{published.value:.2f}", mean, notes=note or (f"published: {source}",), hint=source)


def _published_protocol(published: Published) -> str:
    limit = published.source.max_windows
    windows = "all windows" if limit is None else f"the first {limit} windows"
    tokens = "of a length that is not stated" if published.seqlen is None else f"of {published.seqlen} tokens"
    return f"{published.text}, {windows} {tokens}"


def _difference(paper: Paper, point: Point) -> Cell:
    """From the published figure to the measured one, where both have one protocol."""
    published = paper.beside(point)
    if published is None or published.value is None or not comparable(published, point):
        return Cell()
    difference = Mean((100 * (point.perplexity[published.text].mean / published.value - 1),))
    theirs, ours = published.source.calibration, point.runs[0].calibration
    differs = theirs and ours and ours != theirs and not point.dense and point.method != "Magnitude"
    return Cell(
        f"{difference.mean:+.1f}", difference, notes=(f"published with calibration on {theirs}",) if differs else ()
    )


def _walk(point: Point) -> Cell:
    if point.walk is None:
        return Cell()
    resumed = all(run.resumed for run in point.runs)
    note = ("a resumed run: seconds after its last start only",) if resumed else ()
    return Cell(with_std(point.walk, ".0f" if point.walk.mean >= 10 else ".1f"), point.walk, notes=note)


def _memory(point: Point) -> Cell:
    if point.memory is None:
        return Cell()
    gibibytes = Mean((point.memory / 2**30,))
    return Cell(with_std(gibibytes, ".2f"), gibibytes)


def in_percent(share: Mean) -> Mean:
    """A share times a hundred."""
    return Mean(tuple(100 * value for value in share.values), None if share.error is None else 100 * share.error)


def with_std(mean: Mean, form: str) -> str:
    """A mean, with standard deviation and number of seeds where there are several, or the standard error of one."""
    if mean.std is not None:
        return f"{mean.mean:{form}} ± {mean.std:{form}} (n={mean.n})"
    return f"{mean.mean:{form}}" + ("" if mean.error is None else f" ± {mean.error:{form}}")


def _best(points: Sequence[Point], texts: Sequence[str]) -> set[tuple[int, str]]:
    """Lowest perplexity and highest accuracy among two or more rows of one model, pattern and protocol."""
    groups: dict[tuple[Any, ...], list[tuple[float, int]]] = {}
    for point in points:
        if not point.dense:
            for text in texts:
                if mean := point.perplexity.get(text):
                    group = (text, point.model, point.pattern, point.protocols[text])
                    groups.setdefault(group, []).append((mean.mean, id(point)))
            if point.accuracy:
                key = ("zero-shot", point.model, point.pattern, _tasks(point))
                groups.setdefault(key, []).append((-point.accuracy.mean, id(point)))
    return {
        (which, group[0])
        for group, found in groups.items()
        if len(found) > 1
        for value, which in found
        if value == min(found)[0]
    }


def _warnings(points: Sequence[Point], usual: Mapping[tuple[str, str], Protocol]) -> Iterator[str]:
    """What has to be seen before any figure."""
    mixed = [
        point
        for point in points
        if any(protocol != usual[point.model, text] for text, protocol in point.protocols.items())
    ]
    if mixed:
        yield (
            f"MIXED PROTOCOLS: {len(mixed)} of {len(points)} rows were measured otherwise than most; "
            "their perplexities are marked and must not be compared with the others."
        )


def _left_out(points: Sequence[Point], runs: Sequence[Run]) -> Iterator[Broken]:
    """Runs that succeeded and are in no row: nothing is dropped without a word."""
    used = {run.name for point in points if not point.dense for run in point.runs}
    for run in runs:
        if run.name in used or (run.stage == "dense" and not run.config.get("pruner")):
            continue
        if run.stage == "dense":
            yield Broken(run.name, "without figures", "nothing was measured of the pruned model", run.experiment)
        else:
            yield Broken(run.name, "repeated", "same settings and seed as a later run, which counts", run.experiment)
