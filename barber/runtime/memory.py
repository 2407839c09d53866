"""How much memory there is, and how it is kept."""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch


def physical_memory(device: torch.device) -> int:
    """Bytes that the device has in all; for a CPU those of the machine.

    What is free at the moment is not asked: the same run on the same machine has to make the same choices.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, without what was freed and not given back."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    with suppress(OSError):  # where there is no such file, the peak is that since the process began
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had at a time: of tensors on a GPU, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes * (1 if sys.platform == "darwin" else 1024)
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


@cache
def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors, in pieces of up to 32 MiB.

    By default glibc hands it back to Linux, which gives it again as pages of zeros, one fault for every 4 KiB: most of
    the faults of a walk on a CPU. Larger pieces, such as logits, do go back: glibc cannot put an aligned piece
    where one of its very size has been, and every batch would take new memory. Where there is no glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)
