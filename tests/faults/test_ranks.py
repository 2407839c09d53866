"""Whatever ends one of several processes ends all of them, soon, and the same command goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.campaign import differing
from tests.faults.ending import MISTAKE, end_at, run
from tests.processes import Outcome, launch

#: Where a process ends, and how many calls of it come before.
PLACES = [
    ("barber.config.experiment", 0),
    ("barber.runtime.distributed.joined", 0),
    ("barber.run.runner.prepare", 0),
    ("barber.run.runner._Run._begin", 0),
    ("barber.run.runner._Run._open", 0),
    ("barber.run.runner._Run._measure", 0),
    ("barber.walk.walk.Walk._look", 3),
    ("barber.model.checkpoint.Checkpoint.finish_layer", 0),
    ("barber.run.runner.note_report", 0),
    ("barber.run.runner._Run._export", 0),
]
SECONDS = 10


def told(outcomes: list[Outcome], rank: int, how: str) -> str | None:
    """What is wrong with how processes have ended of which one made the others end."""
    others = [outcome for number, outcome in enumerate(outcomes) if number != rank]
    if how == "mistake" and (outcomes[rank].code, outcomes[rank].err) != (2, f"barber: {MISTAKE}\n"):
        return f"the one has ended with {outcomes[rank]}"
    if any(other.code == 0 for other in others) or any("Traceback" in other.err for other in others):
        return f"others have ended with {others}"
    if how == "mistake" and any(other.err for other in others):
        return f"others have said something, too: {others}"
    return None


@pytest.mark.parametrize("how", ["mistake", "kill"])
def test_one_process_ends_all_within_ten_seconds(
    how: str,
    command: Callable[[str], list[str]],
    cache: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    arguments = command("model")
    (tmp_path / "whole").mkdir()
    assert [one.code for one in launch(run, arguments, tmp_path / "whole", size=2, folder=tmp_path / "said")] == [0, 0]
    wrong: list[str] = []
    cases = [(place, rank) for place in PLACES for rank in (0, 1)]
    for number, ((place, before), rank) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        # Of a process that is killed only torchrun can tell.
        helped = how == "kill" or number % 4 in (0, 3)
        given: dict[str, Any] = {"size": 2, "folder": tmp_path / "said", "first_failure_ends_all": helped}
        try:
            outcomes = launch(end_at, place, before, rank, how, arguments, folder, patience=SECONDS, **given)
        except TimeoutError as error:
            wrong.append(f"{place} {rank} {how}: {error}")
            continue
        if place.endswith(("_export", "_measure", "joined")) and all(one.code == 0 for one in outcomes):
            continue  # a process that has no part in it
        if problem := told(outcomes, rank, how):
            wrong.append(f"{place} {rank} {how}: {problem}")
        again = launch(run, arguments, folder, size=2, folder=tmp_path / "said")
        problem = differing(folder / "run", tmp_path / "whole" / "run")
        if [one.code for one in again] != [0, 0] or problem:
            wrong.append(f"{place} {rank} {how}, again: {problem} {again}")
    record_property("one of two processes ended, all did and went on:", f"{len(cases) - len(wrong)} of {len(cases)}")
    assert not wrong, "\n".join(wrong)
