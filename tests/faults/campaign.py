"""Commands that are killed or starved of disk at one of their writes, and then given once more."""

import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.cli.running import blocks_of, files_of, record_of
from tests.faults.injecting import Fault, attempt
from tests.processes import Outcome

ENDS = {"kill": -signal.SIGKILL, "term": 128 + signal.SIGTERM, "int": 130}


#: Says what is wrong with how an attempt has ended, if anything is.
Check = Callable[[Outcome, Fault], str | None]


@dataclass
class Counts:
    """How many were tried, how many came out right, and what was wrong with the others."""

    tried: int = 0
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.tried - len(self.wrong)} of {self.tried}"


def carry_out(
    command: list[str],
    faults: Iterable[Fault],
    folder: Path,
    whole: Path,
    check: Check,
    *more: Path,
) -> Counts:
    """Give a command with each of the faults in a folder of its own, and then without.

    Args:
        whole: the run folder of the command without a fault.
        check: says what is wrong with how the first attempt has ended, if anything is.
    """
    counts = Counts()
    for fault in faults:
        place = folder / str(fault).replace(" ", "-")
        first = attempt(command, fault, place, *more)
        wrong = check(first, fault)
        again = attempt(command, None, place, *more)
        if again.result is None or again.result.code != 0:
            wrong = f"{wrong or ''} again: {again.result or again.err[-500:]}"
        wrong = wrong or differing(place / "run", whole)
        counts.tried += 1
        counts.wrong += (f"{fault}: {wrong}",) if wrong else ()
    return counts


def differing(run: Path, whole: Path) -> str | None:
    """What tells two run folders, or the folders of two sweeps, apart; None where times alone do."""
    records = sorted(path.relative_to(whole).parent for path in whole.rglob("record.json"))
    if not records or files_of(run) != files_of(whole):
        return f"other files: {sorted(files_of(run) ^ files_of(whole))}"
    for place in records:
        one, other = record_of(run / place), record_of(whole / place)
        for key in ("status", "results", "sparsity", "linears", "calibration", "files", "seeds"):
            if _lasting(one[key]) != _lasting(other[key]):
                return f"another {key} in {place}"
        if (whole / place / "layers.jsonl").exists() and blocks_of(run / place) != blocks_of(whole / place):
            return f"other layers.jsonl in {place}"
        for file in sorted(files_of(whole / place)):
            kept = file.startswith("model/") or file == "masks.safetensors"
            if kept and (run / place / file).read_bytes() != (whole / place / file).read_bytes():
                return f"another {place / file}"
    return None


def _lasting(part: object) -> object:
    """Without what depends on the time and on what others have kept."""
    if isinstance(part, dict):
        return {key: _lasting(one) for key, one in part.items() if key not in ("cached", "seconds")}
    return part


def ended_as_told(outcome: Outcome, fault: Fault) -> str | None:
    """A killed process says nothing, others that they were interrupted; one that was done may end well."""
    code = outcome.result.code if outcome.result else outcome.code
    said = outcome.result.err if outcome.result else outcome.err
    if code not in (0, ENDS[fault.kind]) or "Traceback" in said:
        return f"ended with {code}: {said[-500:]}"
    return None


def said_in_a_sentence(outcome: Outcome, fault: Fault, most: int = 1) -> str | None:
    """One sentence with path and reason and exit code 1, or no word where the disk was not needed.

    Args:
        most: how many sentences there may be, one a job.
    """
    if outcome.result is None:
        return f"no result: {outcome.code} {outcome.err[-500:]}"
    code, said = outcome.result.code, outcome.result.err
    if code == 0 and "Traceback" not in said:
        return None  # what could not be written was of use to nobody any more
    # The run folder of these commands is "run", and what is in it has a slash in its path.
    told = re.fullmatch(rf"(barber: [^\n]*(/|run)[^\n]*\n){{1,{most}}}", said)
    if code not in (1, 2) or not told or "Traceback" in outcome.result.out:
        return f"ended with {code}: {said[-700:]}"
    return None


def spread(num_calls: int, kinds: Iterable[str], every: int, begin: int = 0, stays: bool = False) -> list[Fault]:
    """Faults at every so manieth call, the kinds by turns."""
    names = list(kinds)
    return [Fault(at, names[turn % len(names)], stays) for turn, at in enumerate(range(begin, num_calls, every))]
