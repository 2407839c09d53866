"""The command line: barber report FOLDER... [--out DIR]; a table NAME.jsonl.gz stands for a folder."""

import argparse
import sys
from pathlib import Path

from barber.report import figures, formats, page, paper, points, records, sources, table
from barber.report.errors import ReportError


def main(arguments: list[str] | None = None, prog: str = "barber report") -> int:
    """Print the table, write everything; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog, description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="runs somewhere below, or a table of them"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; FOLDER/report by default")
    parsed = parser.parse_args(arguments)
    try:
        written = report(parsed.folders, parsed.out or sources.without_ending(parsed.folders[0]) / "report")
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    print(written[0].read_text(encoding="utf-8"))
    print("\n".join(str(path) for path in written))
    return 0


def report(folders: list[Path], out: Path) -> list[Path]:
    """Write table, page and figures of all runs in folders and tables; the paths, table.md first.

    Raises:
        ReportError: there are no records, or paper.yaml has a mistake.
    """
    published = paper.load()
    runs, broken = records.read(folders, published.aliases)
    found = points.points(runs)
    content = table.build(found, runs, broken, published)
    out.mkdir(parents=True, exist_ok=True)
    pictures = figures.draw(found, out)
    texts = {
        "table.md": formats.markdown(content),
        "table.tex": formats.latex(content),
        "table.csv": formats.to_csv(content),
        "index.html": page.html_page(content, pictures),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [*(out / name for name in texts), *(path for picture in pictures for path in (picture.png, picture.svg))]


if __name__ == "__main__":
    sys.exit(main())
