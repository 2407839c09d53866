"""What a click on a row shows: the runs behind it, results and pictures first."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path, PurePath

import yaml

from barber.report.measures import measures, zeros
from barber.report.records import Run
from barber.report.table import Row

EMBEDDED = 8_000_000  # bytes of runs' pictures in a page; what is beyond is named
_PICTURES = {
    "loss": "Error of every block's output with the initial and with the rebuilt mask.",
    "block_errors": "Distance of every block's output from the dense model's, on the test texts.",
}


def panels(rows: Sequence[Row]) -> Iterator[str]:
    """A template a row, `panel-0` and so on; pictures are part of it, as long as there is room."""
    room = EMBEDDED
    for index, row in enumerate(rows):
        point = row.point
        title = ", ".join(part for part in (point.model, point.method, point.pattern) if part)
        runs = []
        for run in point.runs:
            found = pictures(run)
            room -= sum(file.stat().st_size for file in found.values())
            runs.append(_run(run, found, embed=room > 0, alone=len(point.runs) == 1))
        yield f'<template id="panel-{index}"><h2>{escape(title)}</h2>{"".join(runs)}</template>'


def pictures(run: Run) -> dict[str, Path]:
    """A run's own pictures, as far as they are in its folder, by what they show."""
    files: Mapping[str, str] = run.record.get("files") or {}
    inside = {kind: run.folder / PurePath(name).name for kind, name in files.items() if run.folder and _is_png(name)}
    return {_PICTURES.get(kind, kind): file for kind, file in inside.items() if file.is_file()}


def image(content: bytes, kind: str, caption: str) -> str:
    """A picture that is part of the page, and enlarges."""
    text, data = escape(caption), base64.b64encode(content).decode()
    return (
        f'<figure><button type="button" class="enlarge" title="Enlarge"><img alt="{text}" '
        f'src="data:image/{kind};base64,{data}"></button><figcaption>{text}</figcaption></figure>'
    )


def facts(found: Mapping[str, object]) -> str:
    """A list of names and what they stand for."""
    return (
        "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(one))}</dd>" for key, one in found.items()) + "</dl>"
    )


def _is_png(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".png")


def _run(run: Run, found: Mapping[str, Path], embed: bool, alone: bool) -> str:
    record = run.record
    told = {"started": record.get("started"), "finished": record.get("finished"), "git commit": run.commit}
    if run.resumed:
        told["resumed"] = json.dumps(record["resumed"])
    if found and not embed:
        told["pictures"] = ", ".join(map(str, found.values()))
    shown = "".join(image(file.read_bytes(), "png", caption) for caption, file in found.items()) if embed else ""
    state = " open" if alone else ""
    summary = f"<summary>{escape(run.name)}, seed {escape(run.seed)}</summary>"
    parts = f"{_results(run)}{shown}{facts(told)}{''.join(_texts(run))}"
    return f'<details class="run"{state}>{summary}{parts}</details>'


def _results(run: Run) -> str:
    """Every figure with its standard error, a column a stage of the model."""
    cells = {stage: dict(measures(run.at(stage))) for stage in run.results}
    if not cells:
        return "<p>Nothing was measured.</p>"
    counted = {stage: zeros(run.record, stage) for stage in cells}
    rows = {"zeros in the decoder's linears": counted} | {
        name: {stage: column.get(name, "") for stage, column in cells.items()}
        for name in dict.fromkeys(name for column in cells.values() for name in column)
    }
    head = "".join(f'<th scope="col" class="number">{escape(stage)}</th>' for stage in cells)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="number">{escape(text)}</td>' for text in row.values())
        + "</tr>"
        for name, row in rows.items()
    )
    limited = "; * of the first documents only" if any("*" in name for name in rows) else ""
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results of the run"><table class="results">'
        f'<thead><tr><th scope="col">measured</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="legend">± is one standard error, over windows or documents{limited}.</p>'
    )


def _texts(run: Run) -> Iterator[str]:
    """What is long, folded away but for the overrides."""
    record = run.record
    texts = {
        "overrides": "\n".join(map(str, record.get("overrides") or [])),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "versions": yaml.safe_dump(record.get("versions") or {}, sort_keys=False),
        "machine": yaml.safe_dump(record.get("machine") or {}, sort_keys=False),
        "run.log, its end": run.log_tail(),
    }
    for name, text in texts.items():
        if text:
            state = " open" if name == "overrides" else ""
            yield f'<details{state}><summary>{name}</summary><pre tabindex="0">{escape(text)}</pre></details>'
