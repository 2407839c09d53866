"""What the processes of the tests do. Nothing here is imported that looks at the rank before there is one."""

import os
import signal
import sys
import time
from typing import Any


def run_barber(*arguments: str) -> None:
    """`barber ARGUMENTS`."""
    sys.argv = ["barber", *arguments]
    from barber import cli

    cli.main()


def threads_of_barber(*arguments: str) -> int:
    """How many threads torch has in this process after `barber ARGUMENTS`."""
    try:
        run_barber(*arguments)
    except SystemExit as end:  # with which every command ends
        if end.code:
            raise
    import torch

    return torch.get_num_threads()


def run_barber_with_a_late_leader(*arguments: str) -> None:
    if os.environ["RANK"] == "0":
        time.sleep(1)
    run_barber(*arguments)


def run_barber_with_late_helpers(*arguments: str) -> None:
    """Those that help are slow at reading the finished layers of an interrupted run."""
    from barber.model.checkpoint import Checkpoint

    layer = Checkpoint.layer

    def read(checkpoint: Checkpoint, index: int) -> Any:
        time.sleep(1)
        return layer(checkpoint, index)

    if os.environ["RANK"] != "0":
        Checkpoint.layer = read  # type: ignore[method-assign]
    run_barber(*arguments)


def run_barber_up_to_layer(last: int, *arguments: str) -> None:
    """The machine goes down as soon as a layer is finished."""
    from barber.model.checkpoint import Checkpoint

    finish_layer = Checkpoint.finish_layer

    def finish(checkpoint: Checkpoint, index: int, *values: Any) -> None:
        finish_layer(checkpoint, index, *values)
        checkpoint.wait()
        if index == last:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoint.finish_layer = finish  # type: ignore[method-assign]
    run_barber(*arguments)


def run_barber_with_too_little_memory(*arguments: str) -> None:
    """For the processes that help."""
    from barber.walk.walk import Walk

    def fail(*_: Any) -> None:
        raise MemoryError("no room for the block")

    if os.environ["RANK"] != "0":
        Walk._look = fail  # type: ignore[assignment, method-assign]
    run_barber(*arguments)


def run_barber_alone_with_a_rank(*arguments: str) -> None:
    """Other programs leave a RANK behind, too."""
    del os.environ["WORLD_SIZE"]
    os.environ["RANK"] = "3"
    run_barber(*arguments)
