"""Whatever call that writes is the last one of a process, the same command comes to the same bits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.campaign import carry_out, ended_as_told, spread
from tests.faults.conftest import KINDS

#: At every so manieth call, so that a campaign has some twenty kills.
EVERY = {"model": 4, "masks": 5, "streamed": 7, "measured and cached": 7, "sweep": 9, "allocation": 11}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_a_call_that_writes_costs_nothing_but_time(
    kind: str,
    command: Callable[[str], list[str]],
    whole: Callable[[str], tuple[Path, int]],
    cache: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    expected, num_calls = whole(kind)
    faults = spread(num_calls, ("kill", "term", "kill", "int"), EVERY[kind])
    counts = carry_out(command(kind), faults, tmp_path, expected, ended_as_told, cache)
    record_property(f"killed at {num_calls} calls, the same bits afterwards:", str(counts))
    assert not counts.wrong, "\n".join(counts.wrong)
