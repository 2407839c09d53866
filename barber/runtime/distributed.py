"""Several processes, each with its share of the calibration samples (torchrun); one process is the common case.

Statistics are sums over samples. Summed over the processes they are the same numbers everywhere, so that every process
takes the same decisions without being told.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from barber.errors import BarberError, UserError
from barber.runtime.ending import store, together, wait_for_all
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

    def meet(self, where: str) -> None:
        """Wait for all processes at a place of the run.

        Raises:
            EndedError: one of them has ended instead.
        """
        if self.size > 1:
            wait_for_all(self.size, where)

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

    def require_agreement(self, layer: str, found: Mapping[str, Sequence[Tensor]]) -> None:
        """Stop where another process has other numbers, of which nothing later would tell.

        Args:
            layer: whose they are.
            found: masks and float32 weights (O, I), by the name of the linear, in the same order everywhere.

        Raises:
            BarberError: they differ, by a bit.
        """
        if self.size == 1:
            return
        sums_K = torch.stack([torch.stack([_checksum(one_OI) for one_OI in each]).sum() for each in found.values()])
        both_2K = torch.stack([sums_K, -sums_K])
        distributed.all_reduce(both_2K, distributed.ReduceOp.MAX)
        highest_K, lowest_K = both_2K[0], -both_2K[1]
        differ = [name for name, other in zip(found, (highest_K != lowest_K).tolist(), strict=True) if other]
        if differ:
            raise BarberError(
                f"{layer}: the processes have come to different masks or weights, first in {differ[0]}; they need the "
                "same kind of device, the same number of threads and the same versions"
            )

    def require_samples(self, num_samples: int) -> None:
        """Refuse more processes than samples.

        Raises:
            UserError: there are.
        """
        if num_samples < self.size:
            raise UserError(f"torchrun started {self.size} processes, but there are {num_samples} calibration samples")


ALONE = Ranks()


def _checksum(matrix_OI: Tensor) -> Tensor:
    """A number that changes with every bit and its place: (), int64."""
    bits_OI = matrix_OI.contiguous().view(torch.int32) if matrix_OI.dtype == torch.float32 else matrix_OI.int()
    odd_O, odd_I = (2 * (torch.arange(size, device=bits_OI.device) * 2654435761 % 2**30) + 1 for size in bits_OI.shape)
    # In 32 bits, which wrap around: a copy in 64 bits would be twice as large as the weight.
    return ((bits_OI * odd_I.int()).sum(dim=1) * odd_O).sum()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process where several run on a machine; any other device as it is."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started inside this context; alone without it.

    Raises:
        BarberError: another process has ended, and with it the run.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # While rank 0 measures the model, the others wait for it: days, if need be.
    forever = timedelta(days=14)
    wait_for_all(size, "begin")
    distributed.init_process_group(
        backend, timeout=forever, store=store(), rank=int(os.environ["RANK"]), world_size=size
    )
    try:
        with together(size):  # before the others see that this one is gone
            yield Ranks.present()
    finally:
        distributed.destroy_process_group()
