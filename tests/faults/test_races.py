"""Four equal commands at once: one of them has the folder, or each has its own."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.running import Result, barber
from tests.faults.campaign import differing
from tests.faults.conftest import RUN
from tests.processes import launch

FOUR = 4


def race(arguments: list[str], folder: Path) -> list[Result]:
    """Give a command four times at once, in a folder."""
    folder.mkdir(exist_ok=True)
    outcomes = launch(_alone, arguments, folder, size=FOUR, folder=folder.with_name(f"{folder.name}-said"))
    assert all(outcome.result for outcome in outcomes), outcomes
    assert not any("Traceback" in outcome.result.err for outcome in outcomes), outcomes
    return [outcome.result for outcome in outcomes]


def _alone(arguments: list[str], folder: Path) -> Result:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        del os.environ[name]
    os.chdir(folder)
    return barber(*arguments)


@pytest.mark.parametrize("turn", range(5))
@pytest.mark.parametrize("export", ["none", "hf", "masks", "evaluation"])
def test_one_of_four_has_the_folder(
    export: str, turn: int, command: Callable[[str], list[str]], cache: Path, tmp_path: Path
) -> None:
    arguments = [*command("measured and cached")[: -len(RUN)], f"export={export}", *RUN]
    if export == "evaluation":
        arguments = [*command("measured and cached")[: -len(RUN)], "pruner=none", "rebuild=none", *RUN]
    results = race(arguments, tmp_path / "four")
    for result in results:
        assert result.code in (0, 2), results
        if result.code == 2:
            assert re.fullmatch(
                r"barber: hydra.run.dir is the folder of a run that is still going on, .*\n", result.err
            )
    assert sum("Finished in" in result.out for result in results) == 1
    (tmp_path / "alone").mkdir()
    launch(_alone, arguments, tmp_path / "alone", size=1, folder=tmp_path / "said")
    assert differing(tmp_path / "four" / "run", tmp_path / "alone" / "run") is None


@pytest.mark.parametrize("turn", range(5))
def test_runs_of_the_same_second_have_folders_of_their_own(
    turn: int, command: Callable[[str], list[str]], cache: Path, tmp_path: Path
) -> None:
    arguments = command("model")[: -len(RUN)]
    results = race(arguments, tmp_path / "four")
    assert [(result.code, result.err) for result in results] == [(0, "")] * FOUR
    assert len(list((tmp_path / "four" / "outputs" / "runs").glob("*/record.json"))) == FOUR


@pytest.mark.parametrize("turn", range(5))
def test_equal_sweeps_count_their_own_jobs(
    turn: int, command: Callable[[str], list[str]], cache: Path, tmp_path: Path
) -> None:
    results = race(command("sweep"), tmp_path / "four")
    counts = [re.search(r"(\d+) done, (\d+) skipped, (\d+) failed;", result.out) for result in results]
    assert all(counts), results
    numbers = [[int(number) for number in found.groups()] for found in counts if found]
    assert [sum(of_one) for of_one in numbers] == [2] * FOUR, results
    assert sum(done for done, _, _ in numbers) == 2, results
