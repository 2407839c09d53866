"""Several processes, each with its share of the calibration samples (torchrun); one process is the common case.

Statistics are sums over samples. Summed over the processes they are the same numbers everywhere, so that every process
takes the same decisions without being told.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from barber.errors import UserError
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run.

    Args:
        rank: from 0; rank 0 writes what a run writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def present(cls) -> "Ranks":
        """As torch.distributed has it, where it is in use."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, num_samples: int, rank: int | None = None) -> slice:
        """The samples of a process, by default this one: consecutive ones, as equally many for each as can be."""
        rank = self.rank if rank is None else rank
        return slice(num_samples * rank // self.size, num_samples * (rank + 1) // self.size)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; what is given stays as it is."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def broadcast(self, value: Any) -> Any:
        """What rank 0 has as `value`."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until all processes have come as far."""
        if self.size > 1:
            distributed.barrier()

    def require_samples(self, num_samples: int) -> None:
        """Refuse more processes than samples.

        Raises:
            UserError: there are.
        """
        if num_samples < self.size:
            raise UserError(f"torchrun started {self.size} processes, but there are {num_samples} calibration samples")


ALONE = Ranks()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process where several run on a machine; any other device as it is."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started inside this context; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # While rank 0 measures the model, the others wait for it: days, if need be.
    distributed.init_process_group(backend, timeout=timedelta(days=14))
    try:
        yield Ranks.present()
    finally:
        distributed.destroy_process_group()
