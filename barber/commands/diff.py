"""barber diff RUN OTHER_RUN: what two runs have in common and what not: settings, masks, results.

A run is a folder, or TABLE.jsonl.gz#NAME. Masks are compared where both folders hold them: exported with export=masks.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from barber.errors import UserError
from barber.report import sources
from barber.report.errors import ReportError
from barber.run.compare import compare
from barber.run.record import FILE
from barber.runtime.seals import sealed


def main(arguments: list[str], prog: str = "barber diff") -> int:
    """Print the comparison.

    Raises:
        UserError: a run is none.
    """
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, metavar="RUN")
    runs = parser.parse_args(arguments).runs
    try:
        with TemporaryDirectory() as scratch:
            print(compare(*(_folder_of(run, Path(scratch)) for run in runs)))
    except ReportError as error:
        raise UserError(str(error)) from error
    return 0


def _folder_of(run: str, scratch: Path) -> Path:
    """The folder of a run; of a run in a table one that is made in `scratch`, with its record alone."""
    if Path(run).is_dir():
        return Path(run)
    if not Path(run.partition("#")[0]).is_file():
        raise UserError(f"{run} must be the folder of a run, or TABLE.jsonl.gz#NAME")
    folder = Path(mkdtemp(dir=scratch))
    (folder / FILE).write_text(json.dumps(sealed(sources.one(run))), encoding="utf-8")
    return folder
