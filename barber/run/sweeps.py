"""The jobs of a sweep: what is done already is skipped, a failure stops no other job, and a table tells at the end.

Every job adds a line to `jobs.jsonl` in the sweep's folder; the folder collects the jobs of all sweeps of its name.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from rich.table import Table
from rich.text import Text

from barber.errors import UserError, in_one_line
from barber.evals.results import StageResults
from barber.run.claim import clear, owned
from barber.run.display import console, headline
from barber.run.reading import successful
from barber.run.record import FILE, RunRecord
from barber.runtime.files import append_line
from barber.runtime.locks import locked
from barber.runtime.plain import plain, typed

log = logging.getLogger("barber")

JOBS = "jobs.jsonl"
# Where launchers' processes find which sweep theirs is: another one may go on in the same folder.
SWEEP = "BARBER_SWEEP"
# And what it will do, see `naming.plan`.
PLAN = "BARBER_SWEEP_PLAN"


@dataclass(frozen=True)
class Job:
    """What became of a job; its overrides tell which one it is."""

    folder: str
    overrides: list[str]
    status: Literal["done", "skipped", "failed"]
    seconds: float
    error: str | None = None
    sweep: str | None = None


def announce(number: int, sweep: Path, overrides: list[str]) -> None:
    """Say which job of a sweep begins: by what it differs from the others, and how long they all will take.

    Args:
        number: of the job, from 0.
        sweep: the sweep's folder.
        overrides: of the job.
    """
    plan = json.loads(os.environ.get(PLAN, "{}"))
    varying = " ".join(one for one in overrides if one.lstrip("+").partition("=")[0] in plan.get("keys", ()))
    total = plan.get("jobs")
    done = [job.seconds for job in _jobs_since(sweep, 0) if job.status == "done"] if (sweep / JOBS).exists() else []
    left = ""
    if total and number < total and done:
        minutes = median(done) * (total - number) / 60
        left = f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
    log.info("Job %d%s%s: %s", number + 1, f" of {total}" if total else "", left, varying or sweep.name)


def carry_out(
    run: Callable[[str | None], RunRecord], folder: Path, sweep: Path, digest: str, overrides: list[str], may_skip: bool
) -> dict[str, StageResults] | None:
    """Do a job, or skip it if it is done; a failure is told and kept, and the sweep goes on.

    Args:
        run: does it, on a device if one is named.
        folder: of the job.
        sweep: of all jobs.
        digest: of the job's config: a successful record with the same one is what the job would give.
        overrides: of the job.
        may_skip: whether to look for such a record.

    Returns the results of the record; None if the job failed.
    """
    start = time.perf_counter()

    def note(status: Literal["done", "skipped", "failed"], error: str | None = None) -> None:
        seconds = round(time.perf_counter() - start, 1)
        job = Job(str(folder), overrides, status, seconds, error, os.environ.get(SWEEP))
        append_line(sweep / JOBS, json.dumps(asdict(job)))

    try:
        with owned(folder):
            found = successful(folder)
            if may_skip and found is not None and found.digest == digest:
                clear(folder)  # after a kill when all was done
                log.info("Done before, %s: %s", found.finished, folder)
                note("skipped")
                return found.results
            with free_gpu() as device:
                record = run(device)
    except (KeyboardInterrupt, SystemExit):
        note("failed", "interrupted")
        raise
    except BaseException as error:
        note("failed", in_one_line(error))
        raise
    note("done")
    return record.results


@contextmanager
def free_gpu() -> Iterator[str | None]:
    """A GPU that no other job of a sweep has, as `cuda:INDEX`, waited for if need be; None where there is none.

    Two jobs on one GPU would take its memory from each other.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield None
        return
    while True:
        for index in range(count):
            # By its identity: what a process calls number 0 may be another GPU than another process's number 0.
            identity = torch.cuda.get_device_properties(index).uuid
            path = Path(tempfile.gettempdir()) / f"barber-gpu-{identity}-{os.getuid()}.lock"
            if (lock := locked(path)) is not None:
                try:
                    yield f"cuda:{index}"
                finally:
                    lock.release()
                return
        time.sleep(1)


def objective(results: Mapping[str, StageResults], key: str) -> float | None:
    """The figure that a search is for, `rebuilt.perplexity.wikitext2.nll_per_token`; None where it is not finite.

    Raises:
        UserError: the results have no such figure.
    """
    node = plain(results)
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            known = ", ".join(map(str, node)) if isinstance(node, Mapping) else "nothing below it"
            raise UserError(f"must name a figure of the results: {key} has no {part}, there is {known}", "objective")
        node = node[part]
    if not isinstance(node, int | float):
        raise UserError(f"must name a figure of the results; {key} is {type(node).__name__}", "objective")
    if not isfinite(node):
        log.warning("%s is %s; the search goes on without it.", key, node)
        return None
    return float(node)


def position(sweep: Path) -> int:
    """Where the lines of a sweep that begins now will begin in the jobs' file."""
    jobs = sweep / JOBS
    return jobs.stat().st_size if jobs.exists() else 0


def _jobs_since(sweep: Path, begin: int) -> list[Job]:
    """The jobs of this sweep, less lines that a kill or a full disk has torn."""
    jobs = []
    for line in (sweep / JOBS).read_bytes()[begin:].splitlines():
        with suppress(ValueError):
            jobs.append(typed(Job, json.loads(line)))
    return [job for job in jobs if job.sweep in (None, os.environ.get(SWEEP))]


def summary(sweep: Path, begin: int) -> int:
    """Show what became of the jobs since `begin`; returns the exit code, 1 if any failed or none was begun."""
    if not (sweep / JOBS).exists():
        return 1
    jobs = _jobs_since(sweep, begin)
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    points = [" ".join(override for override in job.overrides if override not in common) for job in jobs]
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for column in ("job", "", "result", "seconds"):
        table.add_column(column, justify="right" if column in ("result", "seconds") else "left")
    for job, point in zip(jobs, points, strict=True):
        record = successful(Path(job.folder)) if job.status != "failed" else None
        result = headline(record.results) if record else ""
        name = Text(point or Path(job.folder).name)  # in `rebuild=[barber,swaps]` rich would take the list for a style
        table.add_row(name, job.status, Text(result), f"{job.seconds:.0f}")
    console.print()
    console.print(table)
    for job, point in zip(jobs, points, strict=True):
        if job.status == "failed":
            console.print(f"failed: {point}: {job.error} ({Path(job.folder) / FILE})", markup=False, soft_wrap=True)
    counts = [f"{sum(job.status == status for job in jobs)} {status}" for status in ("done", "skipped", "failed")]
    console.print(f"\n{', '.join(counts)}; barber report {sweep}", markup=False, soft_wrap=True)
    return int(not jobs or any(job.status == "failed" for job in jobs))
