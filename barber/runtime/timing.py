"""Seconds by phase, without waiting for a GPU that works on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# on a GPU in its stream of work, which has not come there yet
Moment = float | torch.cuda.Event


@dataclass
class Stopwatch:
    """Seconds by phase; on a GPU those of the work that a phase ordered, read off when they are asked for.

    What a phase inside another takes is its own, so that phases add up.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _seconds: dict[str, float] = field(default_factory=dict)
    _spans: list[tuple[str, str | None, Moment, Moment]] = field(default_factory=list)
    _open: str | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside this context."""
        outer, self._open = self._open, phase
        begin = self._now()
        try:
            yield
        finally:
            self._spans.append((phase, outer, begin, self._now()))
            self._open = outer
            if self.device.type != "cuda":
                self._count()

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds so far, in a dictionary that goes on counting; waits for a GPU's work."""
        self._count()
        return self._seconds

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _count(self) -> None:
        for phase, outer, begin, end in self._spans:
            took = _between(begin, end)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + took
            if outer is not None:
                self._seconds[outer] = self._seconds.get(outer, 0.0) - took
        self._spans.clear()


def _between(begin: Moment, end: Moment) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
