"""Processes that end somewhere. Nothing here imports barber.cli: it looks at the rank when it is imported."""

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from barber.errors import UserError

MISTAKE = "model.path must be there for every process"


def run(arguments: list[str], folder: Path) -> None:
    os.chdir(folder)
    sys.argv = ["barber", *arguments]
    from barber import cli

    cli.main()


def end_at(place: str, before: int, rank: int, how: str, arguments: list[str], folder: Path) -> None:
    """`barber ARGUMENTS`, but one of the processes ends at a function."""
    path, name = place.rsplit(".", 1)
    try:
        owner: Any = importlib.import_module(path)
    except ModuleNotFoundError:
        owner = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
    if place.endswith(".joined"):
        owner = importlib.import_module("barber.run.runner")
    function, calls = getattr(owner, name), iter(range(10**9))

    def ending(*given: Any, **named: Any) -> Any:
        if os.environ["RANK"] == str(rank) and next(calls) == before:
            if how == "mistake":
                raise UserError(MISTAKE)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)

    setattr(owner, name, ending)
    run(arguments, folder)
