"""Where the activations of all samples wait between two layers: on the device, in host memory, or on disk."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

import torch

from barber.runtime.files import writing
from barber.runtime.memory import physical_memory
from barber.runtime.tensors import Tensor, as_bytes

Place = Literal["auto", "device", "host", "disk"]

# Two streams, the outputs of the two blocks, the dense ones of the one at work: that many are there at once,
SETS = 5
# and that many more where the dense stream and its outputs are kept.
DENSE_SETS = 3
# of a device's or the host's memory for all of them
_SHARE = 0.4


class Activations(Protocol):
    """(N, L, D) numbers, read and written by slices of samples."""

    shape: tuple[int, int, int]

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        ...

    def __getitem__(self, samples: slice) -> Tensor:
        """The samples, on the device."""
        ...

    def __setitem__(self, samples: slice, value_BLD: Tensor) -> None: ...


@dataclass(frozen=True)
class ActivationStore:
    """Makes room for activations.

    Args:
        place: `device`, `host` or `disk`; `auto`: the first of them of which they take less than two fifths.
        device: where they are computed with.
        dtype: of the numbers.
        folder: for the files of `disk`; they vanish with the process.
        sets: how many are there at once, for `auto`.
    """

    place: Place
    device: torch.device
    dtype: torch.dtype
    folder: Path | None = None
    sets: int = SETS

    def empty(self, num_samples: int, seqlen: int, width: int) -> Activations:
        """Room for (N, L, D) numbers."""
        shape = (num_samples, seqlen, width)
        place = self.place_of(*shape)
        if place == "disk":
            return _OnDisk(shape, self.dtype, self.device, self.folder)
        if place == "host":
            pinned = self.device.type == "cuda"
            return _InMemory(shape, torch.empty(shape, dtype=self.dtype, pin_memory=pinned), self.device)
        return _InMemory(shape, torch.empty(shape, dtype=self.dtype, device=self.device), self.device)

    def place_of(self, num_samples: int, seqlen: int, width: int) -> Place:
        """Where (N, L, D) numbers go."""
        if self.place != "auto":
            return self.place
        num_bytes = self.sets * num_samples * seqlen * width * self.dtype.itemsize
        if num_bytes < _SHARE * physical_memory(self.device):
            return "device"
        return "host" if num_bytes < _SHARE * physical_memory(torch.device("cpu")) else "disk"


@dataclass
class _InMemory:
    shape: tuple[int, int, int]
    values_NLD: Tensor
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values_NLD.dtype

    def __getitem__(self, samples: slice) -> Tensor:
        return self.values_NLD[samples].to(self.device, non_blocking=True)

    def __setitem__(self, samples: slice, value_BLD: Tensor) -> None:
        # Pinned memory is read and written in the order of the device's stream: nothing has to be waited for.
        self.values_NLD[samples].copy_(value_BLD.view_as(self.values_NLD[samples]), non_blocking=True)


class _OnDisk:
    """A file without a name: the system removes it with the process, however that ends."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, folder: Path | None
    ) -> None:
        self.shape, self.dtype, self._device = shape, dtype, device
        self._sample_bytes = shape[1] * shape[2] * dtype.itemsize
        self._folder = folder or Path(tempfile.gettempdir())
        with writing(self._folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)

    def __getitem__(self, samples: slice) -> Tensor:
        start, stop, _ = samples.indices(self.shape[0])
        value = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        content = as_bytes(value)
        done = 0
        while done < len(content):  # Linux gives 2 GiB at most in one go
            read = os.preadv(self._file.fileno(), [content[done:]], start * self._sample_bytes + done)
            if not read:
                raise OSError("the file of the activations ends too early")
            done += read
        return value.to(self._device)

    def __setitem__(self, samples: slice, value_BLD: Tensor) -> None:
        start, _, _ = samples.indices(self.shape[0])
        content = as_bytes(value_BLD.to("cpu", self.dtype).contiguous())
        done = 0
        with writing(self._folder):
            while done < len(content):
                done += os.pwrite(self._file.fileno(), content[done:], start * self._sample_bytes + done)
