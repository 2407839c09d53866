"""Seconds by phase, without waiting for a GPU that works on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stopwatch:
    """Seconds by phase; on a GPU those of the work that a phase ordered, read off when they are asked for.

    What a phase inside another takes is its own, so that phases add up.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _seconds: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _open: str | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds so far; waits for a GPU's work."""
        for phase, outer, start, end in self._events:
            end.synchronize()
            self._add(phase, outer, start.elapsed_time(end) / 1000)
        self._events.clear()
        return self._seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside this context."""
        outer, self._open = self._open, phase
        try:
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record(torch.cuda.current_stream(self.device))
                try:
                    yield
                finally:
                    end.record(torch.cuda.current_stream(self.device))
                    self._events.append((phase, outer, start, end))
                return
            begun = time.perf_counter()
            try:
                yield
            finally:
                self._add(phase, outer, time.perf_counter() - begun)
        finally:
            self._open = outer

    def _add(self, phase: str, outer: str | None, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds
