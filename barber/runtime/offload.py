"""Carrying a layer's tensors to a GPU and back while the GPU works on another layer.

The weights of a model in host memory are not pinned, so a thread of its own copies them through pinned memory, on a
stream of its own; the stream that computes waits for what it needs and for nothing else.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from barber.runtime.tensors import Tensor, converted


class Offload:
    """Between host memory and one device.

    Args:
        device: a GPU; on a CPU the same is done without streams, for tests.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._fetched: dict[int, Future[list[Tensor]]] = {}
        self._stored: list[Future[None]] = []

    def order(self, key: int, tensors: Sequence[Tensor]) -> None:
        """Begin to bring tensors to the device, floating ones in float32."""
        if key not in self._fetched:
            self._fetched[key] = self._thread.submit(self._fetch, list(tensors))

    def take(self, key: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on the device, ordered before or now."""
        self.order(key, tensors)
        found = self._fetched.pop(key).result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in found:
                tensor.record_stream(current)
        return found

    def put(self, home: Tensor, value: Tensor) -> None:
        """Begin to bring a value home, in the dtype that it has there."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self._device))
        self._stored.append(self._thread.submit(self._store, home, value, ready))

    def wait(self) -> None:
        """Wait until everything is home; an error is raised when all the rest is."""
        stored, self._stored = self._stored, []
        errors = [error for each in stored if (error := each.exception()) is not None]
        if errors:
            raise errors[0]

    def _fetch(self, tensors: list[Tensor]) -> list[Tensor]:
        if self._stream is None:
            return [converted(tensor.clone(), self._device) for tensor in tensors]
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            pinned = [tensor.pin_memory() for tensor in tensors]
            found = [converted(tensor.to(self._device, non_blocking=True), self._device) for tensor in pinned]
            self._stream.synchronize()  # this thread's wait, not the GPU's: pinned memory is free again after it
        return found

    def _store(self, home: Tensor, value: Tensor, ready: Any) -> None:
        context = torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), context:
            if self._stream is None:
                home.copy_(value)
                return
            self._stream.wait_event(ready)
            value.record_stream(self._stream)
            narrow = value.to(home.dtype)
            pinned = torch.empty(narrow.shape, dtype=narrow.dtype, pin_memory=True)
            pinned.copy_(narrow, non_blocking=True)
            self._stream.synchronize()
            home.copy_(pinned)
