"""barber ls [models|methods|patterns|families|texts|experiments]: what there is, read from its files in a moment."""

import ast
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

import barber
from barber.errors import UserError, did_you_mean

# By kind: the folder in conf/ and how a choice of it is said.
_GROUPS = {
    "models": ("model", "model={}"),
    "methods": ("method", "method={}"),
    "patterns": ("pattern", "pattern={}"),
    "texts": ("evals/text", "evals/text={}"),
    "experiments": ("experiment", "experiment={}"),
}
KINDS = (*_GROUPS, "families")
_WIDE = 120


def main(arguments: list[str]) -> int:
    """Print a table of a kind, or how many there are of each.

    Raises:
        UserError: there is no such kind.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        _show([(f"barber ls {kind}", f"{len(found(kind))} {kind}") for kind in KINDS])
        return 0
    kind = next((kind for kind in KINDS if arguments[0].rstrip("s").lower() in (kind, kind[:-1], "family")), "")
    kind = "families" if arguments[0].lower() in ("family", "families") else kind
    if not kind or len(arguments) > 1:
        raise UserError(f"barber ls {' '.join(arguments)}: no such kind{did_you_mean(arguments[0], list(KINDS))}")
    if kind == "methods":
        when = {f"method={row['method']}": row["when"] for row in figures()}
        _show([(said, f"{what} When {when[said]}.") for said, what in found(kind)])
        _show_figures()
    else:
        _show(found(kind))
    return 0


def figures() -> list[dict[str, str]]:
    """What there is to choose a method by, a row each."""
    methods = _methods()["methods"]
    pace = methods["wanda_barber"]["seconds"]
    rows = []
    for name, one in methods.items():
        unstructured, two_of_four = one["perplexity"]
        seconds = one["seconds"] and f"{one['seconds']:g} ({one['seconds'] / pace:.2g}x)"
        memory = one["memory"] and f"{one['memory']:.2f}"
        row = {"method": name, "50 %": unstructured, "2:4": two_of_four, "seconds": seconds, "GiB": memory}
        row |= {key: one[key] for key in ("weights", "needs", "patterns", "when")}
        rows.append({key: str(value or "") for key, value in row.items()})
    return rows


def protocol() -> list[str]:
    """How those figures were measured, a sentence or two each."""
    return [str(sentence) for sentence in _methods()["protocol"]]


def _methods() -> Any:
    return yaml.safe_load(files("barber.commands").joinpath("methods.yaml").read_text(encoding="utf-8"))


def found(kind: str) -> list[tuple[str, str]]:
    """All of a kind: what to say for it, and what it is."""
    if kind == "families":
        folder = Path(barber.__file__).parent / "model" / "families"
        return [(file.stem, _first_line(file)) for file in sorted(folder.glob("[!_]*.py"))]
    group, said = _GROUPS[kind]
    choices = [file for file in files("barber.conf").joinpath(group).iterdir() if file.name.endswith(".yaml")]
    return [
        (said.format(file.name.removesuffix(".yaml")), _about(file.read_text(encoding="utf-8")))
        for file in sorted(choices, key=lambda file: file.name)
    ]


def _about(content: str) -> str:
    """What a config says of itself in its first comment, or else the model that it names."""
    lines = [line for line in content.splitlines() if not line.startswith("# @package")]
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    named = yaml.safe_load(content).get("path", "")
    return ": ".join(part for part in (named if named != "???" else "", " ".join(comment)) if part)


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.(?: |$)", " ".join(text.split()))[0]


def _show_figures() -> None:
    """What methods need and reach; no cell is cut off where the terminal is narrow."""
    rows = [{key: value for key, value in row.items() if key != "when"} for row in figures()]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for key in rows[0]:
        table.add_column(key, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    print()
    Console(highlight=False, markup=False, width=_WIDE).print(table)
    print()
    print(*protocol(), sep="\n")


def _show(rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
