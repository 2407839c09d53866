"""barber ls [models|methods|patterns|families|texts|experiments]: what there is, read from its files in a moment."""

import ast
import re
from importlib.resources import files
from pathlib import Path

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
    _show(found(kind))
    return 0


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


def _show(rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
