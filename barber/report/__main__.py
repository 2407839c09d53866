"""The command line: barber report FOLDER... [--out DIR]; a table NAME.jsonl.gz stands for a folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from barber.report import figures, formats, page, paper, points, records, sources, table
from barber.report.errors import ReportError
from barber.report.experiments import Experiment, experiments, question


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
    """Write table, page and figures of all runs in folders and tables, and those of each experiment among them.

    Returns:
        The paths, table.md first.

    Raises:
        ReportError: there are no records, or paper.yaml has a mistake.
    """
    published = paper.load()
    runs, broken = records.read(folders, published.aliases)
    found = points.points(runs)
    content = table.build(found, runs, broken, published)
    out.mkdir(parents=True, exist_ok=True)
    pictures = figures.draw(found, out)
    parts = experiments(runs, broken)
    links = {part.name: (f"{part.stem}.html", question(part.name)) for part in parts}
    texts = {
        "table.md": formats.markdown(content),
        "table.tex": formats.latex(content),
        "table.csv": formats.to_csv(content),
        "index.html": page.html_page(content, pictures, page.front(content, folders, links)),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    pages = [path for part in parts for path in _page_of(part, published, out)]
    return [*(out / name for name in texts), *_files(pictures), *pages]


def _page_of(part: Experiment, published: paper.Paper, out: Path) -> list[Path]:
    """Write the page of an experiment and its pictures; the paths."""
    found = points.points(part.runs)
    content = table.build(found, part.runs, part.broken, published)
    pictures = figures.draw(found, out / part.stem)
    file = out / f"{part.stem}.html"
    file.write_text(page.html_page(content, pictures, part.front(found)), encoding="utf-8")
    return [file, *_files(pictures)]


def _files(pictures: Sequence[figures.Picture]) -> list[Path]:
    return [path for picture in pictures for path in (picture.png, picture.svg)]


if __name__ == "__main__":
    sys.exit(main())
