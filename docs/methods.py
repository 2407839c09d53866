"""Write the tables of methods in methods.md and the README: `python docs/methods.py`."""

from pathlib import Path

from barber.commands.ls import figures

BEGIN, END = "<!-- methods -->", "<!-- /methods -->"
DOCS = Path(__file__).parent
PAGE, README = DOCS / "methods.md", DOCS.parent / "README.md"
# The README has those that win something, and what they are compared with.
SHORT = ("magnitude", "wanda", "wanda_barber", "best_mask", "sparsegpt", "admm", "best_update")
COLUMNS = {
    PAGE: ("method", "when", "50 %", "2:4", "seconds", "GiB", "weights", "needs", "patterns"),
    README: ("method", "when", "50 %", "2:4", "seconds", "GiB", "weights"),
}


def filled(path: Path) -> str:
    """A page with its table as it is now between the two markers."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    shown = [row for row in figures() if path == PAGE or row["method"] in SHORT]
    lines = table([{key: row[key] for key in COLUMNS[path]} for row in shown])
    return "\n".join([before + BEGIN, "", *lines, "", END + rest.partition(END)[2]])


def table(rows: list[dict[str, str]]) -> list[str]:
    """The lines of a table in Markdown."""
    head = ["`method=`" if key == "method" else key for key in rows[0]]
    body = [[f"`{value}`" if key == "method" else value for key, value in row.items()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


if __name__ == "__main__":
    for path in (PAGE, README):
        path.write_text(filled(path), encoding="utf-8")
