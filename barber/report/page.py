"""The table, the figures and every run's settings as one HTML file that needs nothing else."""

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

import yaml

from barber.report.figures import Picture
from barber.report.records import Broken, Run
from barber.report.table import Cell, Column, Row, Table, letter

_HERE = Path(__file__).parent


def html_page(table: Table, pictures: Sequence[Picture]) -> str:
    """The page: style, script and pictures are part of it."""
    template = Template((_HERE / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        summary=f"{len({run.name for row in table.rows for run in row.point.runs})} runs in {len(table.rows)} rows",
        warnings="".join(f'<p class="warning" role="alert">{escape(warning)}</p>' for warning in table.warnings),
        head="".join(_head(table, column) for column in table.columns),
        body="\n".join(_row(table, row, i) for i, row in enumerate(table.rows)),
        notes="".join(
            f'<li id="note-{letter(i)}"><b>{letter(i)}</b> {escape(note)}</li>' for i, note in enumerate(table.notes)
        ),
        legend=" ".join(map(escape, table.legend)),
        broken=_broken(table.broken),
        figures="\n".join(map(_figure, pictures)),
        panels="\n".join(_panel(row, i) for i, row in enumerate(table.rows)),
    )


def _kind(table: Table, column: Column) -> str:
    noted = column.numeric and any(row.cells[column.title].notes for row in table.rows)
    return ("number" if column.numeric else "text") + (" noted" if noted else "")


def _head(table: Table, column: Column) -> str:
    return f'<th scope="col" class="{_kind(table, column)}"><button type="button">{escape(column.title)}</button></th>'


def _row(table: Table, row: Row, index: int) -> str:
    cells = "".join(_cell(table, row, column, index) for column in table.columns)
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


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.svg.read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _panel(row: Row, index: int) -> str:
    """What a click on a row shows: the record of every run behind it."""
    title = ", ".join(part for part in (row.point.model, row.point.method, row.point.pattern) if part)
    runs = "".join(_run(run, alone=len(row.point.runs) == 1) for run in row.point.runs)
    return f'<template id="panel-{index}"><h2>{escape(title)}</h2>{runs}</template>'


def _run(run: Run, alone: bool) -> str:
    record = run.record
    git = record.get("git") or {}
    commit = f"{git.get('commit', 'unknown')}{' with changes' if git.get('dirty') else ''}"
    facts = {"started": record.get("started"), "finished": record.get("finished"), "git commit": commit}
    if run.resumed:
        facts["resumed"] = json.dumps(record["resumed"])
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    texts = {
        "overrides": "\n".join(map(str, record.get("overrides") or [])),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "versions": yaml.safe_dump(record.get("versions") or {}, sort_keys=False),
        "machine": yaml.safe_dump(record.get("machine") or {}, sort_keys=False),
        "run.log, its end": run.log_tail(),
    }
    parts = "".join(f'<h4>{key}</h4><pre tabindex="0">{escape(text)}</pre>' for key, text in texts.items() if text)
    state = " open" if alone else ""
    summary = f"<summary>{escape(run.name)}, seed {escape(run.seed)}</summary>"
    return f"<details{state}>{summary}<dl>{listed}</dl>{parts}</details>"
