"""The table as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Iterator, Sequence

from barber.report.records import Broken
from barber.report.table import Cell, Table, letter


def markdown(table: Table) -> str:
    """For people, on a page or in a terminal."""
    return "\n".join(_markdown(table)) + "\n"


def latex(table: Table) -> str:
    r"""A table environment to \input into a paper; it needs the package booktabs."""
    return "\n".join(_latex(table)) + "\n"


def to_csv(table: Table) -> str:
    """Plain figures for other tools: mean, standard error, deviation and number of seeds in columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    beside = {column.title: _beside(table, column.title) for column in table.columns}
    header: list[str] = []
    for title, names in beside.items():
        header += [title, *(f"{title} {name}" for name in names)]
        header += ["published source"] if title == "published" else []
    writer.writerow([*header, "notes"])
    for row in table.rows:
        fields: list[str] = []
        for title, names in beside.items():
            cell = row.cells[title]
            fields += _fields(cell, names)
            fields += [cell.hint] if title == "published" else []
        notes = dict.fromkeys(note for column in table.columns for note in row.cells[column.title].notes)
        writer.writerow([*fields, "; ".join(notes)])
    return out.getvalue()


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in text)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it stands in a table's cell."""
    for character in "\\`*_<>|[]":
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "\n": " ",
    **{character: "\\" + character for character in "%_&#$" + "{}"},
}


def _markdown(table: Table) -> Iterator[str]:
    yield from (f"> **{warning}**\n" for warning in table.warnings)
    yield "| " + " | ".join(escape_markdown(column.title) for column in table.columns) + " |"
    yield "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|"
    for row in table.rows:
        yield "| " + " | ".join(_markdown_cell(table, row.cells[column.title]) for column in table.columns) + " |"
    if table.notes:
        yield ""
        yield from (f"- <sup>{letter(i)}</sup> {escape_markdown(note)}" for i, note in enumerate(table.notes))
    yield from (f"\n{sentence}" for sentence in table.legend)
    if table.broken:
        yield "\nRuns that are not in the table:\n"
        yield "| run | status | reason |\n|---|---|---|"
        yield from (f"| {' | '.join(map(escape_markdown, _parts(one)))} |" for one in table.broken)


def _markdown_cell(table: Table, cell: Cell) -> str:
    text = escape_markdown(cell.text)
    text = f"**{text}**" if cell.best else text
    return text + (f" <sup>{marks}</sup>" if (marks := table.marks(cell)) else "")


def _latex(table: Table) -> Iterator[str]:
    yield "% needs \\usepackage{booktabs}"
    yield "\\begin{table}\n\\centering\n\\footnotesize\n\\setlength{\\tabcolsep}{4pt}"
    yield "\\begin{tabular}{" + "".join("r" if column.numeric else "l" for column in table.columns) + "}\n\\toprule"
    yield _latex_row([escape_latex(column.title) for column in table.columns])
    group = None
    for row in table.rows:
        if group != (group := (row.point.model, row.point.pattern)):
            yield "\\midrule"
        yield _latex_row([_latex_cell(table, row.cells[column.title]) for column in table.columns])
    yield "\\bottomrule\n\\end{tabular}\n"
    yield from (f"\\par\\textbf{{{escape_latex(warning)}}}" for warning in table.warnings)
    yield from (f"\\par {escape_latex(sentence)}" for sentence in table.legend if sentence.startswith("±"))
    for index, note in enumerate(table.notes):
        yield f"\\par\\textsuperscript{{{letter(index)}}} {escape_latex(note)}."
    yield from (
        f"\\par Not in the table: {escape_latex(one.name)} ({escape_latex(one.status)}: {escape_latex(one.error)})."
        for one in table.broken
    )
    yield "\\end{table}"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(table: Table, cell: Cell) -> str:
    text = escape_latex(cell.text)
    text = f"\\textbf{{{text}}}" if cell.best else text
    return text + (f"\\textsuperscript{{{marks}}}" if (marks := table.marks(cell)) else "")


def _beside(table: Table, title: str) -> list[str]:
    """What stands beside the means of a column, in columns of its own."""
    means = [mean for row in table.rows if (mean := row.cells[title].mean)]
    names = ["standard error"] if any(mean.error is not None for mean in means) else []
    return names + (["std", "n"] if any(mean.n > 1 for mean in means) else [])


def _fields(cell: Cell, beside: Sequence[str]) -> list[str]:
    if (mean := cell.mean) is None:
        return [cell.text if cell.text != "–" else "", *([""] * len(beside))]
    known = {"standard error": mean.error, "std": mean.std, "n": mean.n}
    return [f"{mean.mean:.10g}", *("" if (value := known[name]) is None else f"{value:.10g}" for name in beside)]


def _parts(one: Broken) -> tuple[str, str, str]:
    return one.name, one.status, one.error
