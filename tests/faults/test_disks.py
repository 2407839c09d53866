"""Whatever write a disk does not take is told with its path, and nothing half-written is believed afterwards."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.campaign import carry_out, said_in_a_sentence, spread
from tests.faults.conftest import KINDS

EVERY = {"model": 4, "masks": 5, "streamed": 7, "measured and cached": 7, "sweep": 9, "allocation": 11}


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_fails_ends_in_a_sentence_and_the_same_command_goes_on(
    kind: str,
    command: Callable[[str], list[str]],
    whole: Callable[[str], tuple[Path, int]],
    cache: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    expected, num_calls = whole(kind)
    faults = spread(num_calls, ("full", "broken", "denied"), EVERY[kind], begin=1)
    faults += spread(num_calls, ("full",), 5 * EVERY[kind], begin=2, stays=True)
    counts = carry_out(command(kind), faults, tmp_path, expected, said_in_a_sentence, cache)
    record_property(f"failed at {num_calls} calls, told and gone on with:", str(counts))
    assert not counts.wrong, "\n".join(counts.wrong)
