"""Seconds by phase, without waiting for a GPU that works on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stopwatch:
    """Seconds by phase; on a GPU those of the work that a phase ordered, read off when they are asked for."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _seconds: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds so far; waits for a GPU's work."""
        for phase, start, end in self._events:
            end.synchronize()
            self._add(phase, start.elapsed_time(end) / 1000)
        self._events.clear()
        return self._seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside this context."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record(torch.cuda.current_stream(self.device))
            try:
                yield
            finally:
                end.record(torch.cuda.current_stream(self.device))
                self._events.append((phase, start, end))
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._add(phase, time.perf_counter() - begun)

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
