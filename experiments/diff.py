"""What two runs have in common and what not: settings, masks, results.

    python -m experiments.diff RUN_FOLDER OTHER_RUN_FOLDER

A run of a table is TABLE.jsonl.gz#NAME. Masks are compared where both folders hold them: exported with export=masks.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from barber.errors import UserError
from barber.run.compare import compare
from barber.runtime.seals import sealed
from experiments.report import sources
from experiments.report.errors import ReportError


def folder_of(run: str, scratch: Path) -> Path:
    """The folder of a run; of a run in a table one that is made in `scratch`, with its record alone."""
    if Path(run).is_dir():
        return Path(run)
    folder = Path(mkdtemp(dir=scratch))
    (folder / sources.FILE).write_text(json.dumps(sealed(sources.one(run))), encoding="utf-8")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python -m experiments.diff RUN_FOLDER OTHER_RUN_FOLDER", file=sys.stderr)
        sys.exit(2)
    try:
        with TemporaryDirectory() as scratch:
            print(compare(*(folder_of(run, Path(scratch)) for run in sys.argv[1:])))
    except (UserError, ReportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
