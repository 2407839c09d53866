"""Pack the records of many runs into a table: python -m experiments.pack TABLE.jsonl.gz FOLDER [FOLDER...]

A table is one small file with all that the report reads of the runs, but for rows a linear or a block: it is what to
keep, and to publish, once the folders go. FOLDER may be a table, too: to add runs to one, pack it and their folders.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from barber.report import sources
from barber.report.errors import ReportError


def main(arguments: list[str] | None = None) -> int:
    """Write the table; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pack", description=__doc__)
    parser.add_argument("table", type=Path, metavar="TABLE.jsonl.gz", help="the table to write")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders with runs somewhere below")
    parsed = parser.parse_args(arguments)
    try:
        count = pack(parsed.table, parsed.folders)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{parsed.table}: {count} records, {parsed.table.stat().st_size:,} bytes")
    return 0


def pack(table: Path, folders: list[Path]) -> int:
    """Write the records of all runs below the folders into a table; their number.

    Raises:
        ReportError: the table has the name or the place of none, or the folders have no run that succeeded, a record
            that cannot be read, or two runs of one name.
    """
    if not table.name.endswith(sources.TABLE):
        raise ReportError(f"The name of a table ends with {sources.TABLE}, not as {table} does.")
    if inside := [folder for folder in folders if folder.resolve() in table.resolve().parents]:
        raise ReportError(f"{table} lies in {inside[0]}, where a report would find its runs twice: write it elsewhere.")
    found = sources.find(folders)
    if unreadable := [run for run in found if run.record is None]:
        raise ReportError(unreadable[0].error)
    records = {run.name: run.record for run in found if run.record is not None}
    if not any(record["status"] == "success" for record in records.values()):
        raise ReportError(f"None of the {len(records)} runs below {', '.join(map(str, folders))} has succeeded.")
    twice, times = Counter(run.name for run in found).most_common(1)[0]
    if times > 1:
        raise ReportError(f"{times} of the runs are called {twice}: their folders need other names.")
    try:
        sources.write(table, records)
    except OSError as error:
        raise ReportError(f"{table} cannot be written: {error}.") from error
    return len(records)


if __name__ == "__main__":
    sys.exit(main())
