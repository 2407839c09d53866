"""Seconds by phase add up to those that have passed."""

from unittest import mock

import pytest

from barber.runtime import timing
from barber.runtime.timing import Stopwatch


def test_a_phase_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking = mock.Mock(perf_counter=mock.Mock(side_effect=map(float, range(10))))  # once a look
    monkeypatch.setattr(timing, "time", ticking)
    stopwatch = Stopwatch()
    with stopwatch("walk"):
        with stopwatch("allocate"):
            pass
        with pytest.raises(ValueError, match="given up"), stopwatch("exchange"), stopwatch("try"):
            raise ValueError("given up")
    with stopwatch("allocate"):
        pass
    # looks: 0 walk, 1 and 2 allocate, 3 exchange, 4 and 5 try, 6 exchange, 7 walk, 8 and 9 allocate
    assert stopwatch.seconds == {"walk": 3, "allocate": 2, "exchange": 2, "try": 1}
