"""What `barber` does beside runs. Each is a module with a `main(arguments)` that returns the exit code."""

import platform
import sys
import tempfile
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from barber.habits import understood

NAMES = {
    "ls": "what there is: models, methods, patterns, families, texts, experiments",
    "report": "tables, pictures and a page of the runs below folders",
    "diff": "what two runs have in common and what not",
    "rerun": "a run once more, from its record",
    "doctor": "versions, devices, the hub, extras, room on the disks",
}


def run_of(arguments: list[str], held: ExitStack) -> list[str]:
    """The command line of a run, as Hydra reads it; what is no run is carried out here, and ends the program.

    Args:
        held: what the process has until its end.

    Raises:
        BarberError: it cannot be carried out, or says nothing.
    """
    if arguments[:1] == ["--version"]:
        print(f"barber {version('llm-barber')} (Hydra {version('hydra-core')}, Python {platform.python_version()})")
        sys.exit(0)
    if arguments[:1] == ["rerun"]:
        from barber.commands.rerun import as_run

        arguments = as_run(arguments[1:], Path(held.enter_context(tempfile.TemporaryDirectory(prefix="barber-"))))
    elif arguments and arguments[0] in NAMES:
        sys.exit(import_module(f"barber.commands.{arguments[0]}").main(arguments[1:]))
    return understood(arguments)
