"""The table, the figures and every run's settings as one HTML file that needs nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from barber.report.details import facts, image, panels
from barber.report.figures import Picture
from barber.report.records import Broken
from barber.report.table import Cell, Column, Row, Table, letter

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Front:
    """What a page says beside its table.

    Args:
        title: what it is about.
        said: names and what they stand for, at the top.
        links: other pages, by what they are called: the file and a sentence.
        protocol: how it was measured, at the end.
    """

    title: str
    said: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    protocol: Mapping[str, str] = field(default_factory=dict)


def html_page(table: Table, pictures: Sequence[Picture], front: Front) -> str:
    """The page: style, script and pictures are part of it."""
    template = Template((_HERE / "page.html").read_text(encoding="utf-8"))
    protocol = f"<section><h2>Protocol</h2>{facts(front.protocol)}</section>" if front.protocol else ""
    return template.substitute(
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        title=escape(front.title),
        summary=summary(table),
        said=facts(front.said),
        links=_links(front.links),
        protocol=protocol,
        warnings="".join(f'<p class="warning" role="alert">{escape(warning)}</p>' for warning in table.warnings),
        head="".join(_head(table, column) for column in _in_order(table)),
        models=' class="one-model"' if len({row.point.model for row in table.rows}) == 1 else "",
        width=len(table.columns),
        body="\n".join(_row(table, row, i) for i, row in enumerate(table.rows)),
        notes="".join(
            f'<li id="note-{letter(i)}"><b>{letter(i)}</b> {escape(note)}</li>' for i, note in enumerate(table.notes)
        ),
        legend=" ".join(map(escape, table.legend)),
        broken=_broken(table.broken),
        figures="\n".join(image(picture.svg.read_bytes(), "svg+xml", picture.caption) for picture in pictures),
        panels="\n".join(panels(table.rows)),
    )


def front(table: Table, places: Sequence[Path], links: Mapping[str, tuple[str, str]]) -> Front:
    """Of the page of all runs."""
    models = list(dict.fromkeys(row.point.model for row in table.rows))
    title = f"Pruned language models compared: {', '.join(models) if len(models) <= 3 else len(models)}"
    return Front(
        title if models else "Pruned language models: no figures yet", {"from": ", ".join(map(str, places))}, links
    )


def summary(table: Table) -> str:
    """How much there is, and which way is up."""
    runs = len({run.name for row in table.rows for run in row.point.runs})
    lower = " The lower a perplexity, the better." if any(row.point.perplexity for row in table.rows) else ""
    return f"How well language models do once they are pruned: {runs} runs of barber, in {len(table.rows)} rows.{lower}"


def _links(links: Mapping[str, tuple[str, str]]) -> str:
    items = (
        f'<li><a href="{escape(file)}">{escape(name)}</a>{escape(f": {sentence}" if sentence else "")}</li>'
        for name, (file, sentence) in links.items()
    )
    return f'<nav aria-label="Pages"><ul>{"".join(items)}</ul></nav>' if links else ""


def _in_order(table: Table) -> list[Column]:
    """What was measured stands before the settings, of which there may be more than fit on a screen."""
    return sorted(table.columns, key=lambda one: (one.title not in ("model", "method", "pattern"), not one.measured))


def _kind(table: Table, column: Column) -> str:
    noted = column.numeric and any(row.cells[column.title].notes for row in table.rows)
    return ("number" if column.numeric else "text") + (" noted" if noted else "")


def _head(table: Table, column: Column) -> str:
    return f'<th scope="col" class="{_kind(table, column)}"><button type="button">{escape(column.title)}</button></th>'


def _row(table: Table, row: Row, index: int) -> str:
    cells = "".join(_cell(table, row, column, index) for column in _in_order(table))
    kind = ' class="dense"' if row.point.dense else ""
    return f'<tr data-panel="panel-{index}"{kind}>{cells}</tr>'


def _cell(table: Table, row: Row, column: Column, index: int) -> str:
    cell = row.cells[column.title]
    attributes = f' class="{_kind(table, column)}"'
    if cell.mean is not None:
        attributes += f' data-value="{cell.mean.mean!r}"'
    if cell.hint:
        attributes += f' title="{escape(cell.hint)}"'
    text = escape(cell.text)
    if column.title == "method":
        text = f'<button type="button" class="open" aria-haspopup="dialog">{text}</button>'
    text = f"<strong>{text}</strong>" if cell.best else text
    return f"<td{attributes}>{text}{_marks(table, cell)}</td>"


def _marks(table: Table, cell: Cell) -> str:
    if not cell.notes:
        return ""
    links = (f'<a href="#note-{mark}" title="{escape(note)}">{mark}</a>' for mark, note in table.notes_of(cell))
    return f"<sup>{', '.join(links)}</sup>"


def _broken(broken: Iterable[Broken]) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.name)}</td><td>{escape(one.status)}</td><td>{escape(one.error)}</td></tr>"
        for one in broken
    )
    if not rows:
        return ""
    head = '<thead><tr><th scope="col">run</th><th scope="col">status</th><th scope="col">reason</th></tr></thead>'
    title = '<h2 id="left-out">Runs that are not in the table</h2>'
    region = '<div class="scroll" tabindex="0" role="region" aria-labelledby="left-out">'
    return f"<section>{title}{region}<table>{head}<tbody>{rows}</tbody></table></div></section>"
