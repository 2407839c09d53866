"""Several processes at once, with the environment that torchrun gives them, but quicker started than by it.

They are forked from one process that has imported everything already; each has its output in files of its own.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

# Not barber.cli: it looks at the rank when it is imported.
_IMPORTED_BEFORE = [
    "barber.config",
    "barber.run.runner",
    "hydra.main",
    "hydra._internal.config_loader_impl",
    "transformers.models.llama.modeling_llama",
    "transformers.processing_utils",
    "PIL.PngImagePlugin",
    "tests.tiny",
]


@dataclass(frozen=True)
class Outcome:
    """How a process ended, what it printed, and what its function returned (None if it did not)."""

    code: int
    out: str
    err: str
    result: Any = None


def launch(
    function: Callable[..., Any],
    *arguments: Any,
    size: int,
    folder: Path,
    timeout: float = 60,
    first_failure_ends_all: bool = False,
    patience: float | None = None,
) -> list[Outcome]:
    """Call a function of a module in `size` processes; `folder` is for what they say and return.

    With `first_failure_ends_all` the others are told to end when one has failed, as torchrun does. With `patience` they
    have so many seconds for it, told or not.

    Raises:
        TimeoutError: some have not ended in time; they are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_BEFORE)
    # As torchrun has it, the processes meet at a store of the process that started them.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    environment |= {key: value for key, value in os.environ.items() if key.startswith(("BARBER_", "HF_"))}
    processes = [
        context.Process(target=_run, args=(function, arguments, rank, environment, folder)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        time.sleep(0.02)
        if not any(process.exitcode for process in processes):
            continue
        if patience is not None:
            deadline, patience = min(deadline, time.monotonic() + patience), None
        if first_failure_ends_all:
            first_failure_ends_all = False
            for process in processes:
                process.terminate()
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    if hanging:
        said = "\n".join((folder / f"err-{rank}").read_text() for rank in range(size))
        raise TimeoutError(f"after {timeout} s processes {hanging} of {size} were still at work; they said:\n{said}")
    return [_outcome(folder, rank, process.exitcode or 0) for rank, process in enumerate(processes)]


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, environment: dict[str, str], folder: Path
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    torch.save(function(*arguments), folder / f"result-{rank}")


def _outcome(folder: Path, rank: int, code: int) -> Outcome:
    result = folder / f"result-{rank}"
    out, err = ((folder / f"{name}-{rank}").read_text(encoding="utf-8") for name in ("out", "err"))
    return Outcome(code, out, err, torch.load(result, weights_only=False) if result.exists() else None)
