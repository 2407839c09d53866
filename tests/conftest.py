"""Settings of the whole suite."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Before anything imports Triton: where there is no GPU its interpreter runs the kernel.
if find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The models are tiny and pytest-xdist runs a process a core: more threads would only be in each other's way.
torch.set_num_threads(1)
# No test may wait for a network that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


#: What `make test-fast` leaves out, by folder or file, and why.
SLOW = {
    "cli": "runs of the command line",
    "data/test_real.py": "real data",
    "data/test_wikipedia.py": "the whole offline text",
    "evals/test_dense_cache.py": "runs that wait for each other",
    "evals/test_zero_shot.py": "lm-eval, which reads thousands of files",
    "experiments": "a walk beside the plain one",
    "model/test_checkpoint.py": "every moment at which a run may be killed",
    "model/test_packaged.py": "several processes",
    "model/test_streaming.py": "models on disk",
    "report": "reports and pictures of runs",
    "reference/test_command.py": "runs of the command line",
    "run": "runs of the command line, several processes, every published record",
    "runs": "whole runs, launchers, a wheel, a real model",
    "runtime/test_activations.py": "walks with activations in every place",
    "runtime/test_cache.py": "several processes",
    "runtime/test_distributed.py": "several processes",
    "runtime/test_files.py": "several processes",
    "runtime/test_locks.py": "several processes",
    "runtime/test_memory.py": "a fresh Python",
    "runtime/test_numerics.py": "walks in which every look at the device is counted",
    "runtime/test_offload.py": "walks with every way of offloading",
    "runtime/test_precision.py": "walks of every family in every precision",
    "test_imports.py": "a fresh Python, every file of the package",
    "walk/test_all_ranks.py": "several processes",
    "walk/test_checks.py": "peft, which takes seconds to import",
    "walk/test_schedule.py": "every kind of layer walked in two ways; test_walk has the loops",
}


#: Campaigns, for `make test-faults` alone.
FAULTS = Path(__file__).parent / "faults"


def is_slow(path: Path) -> bool:
    slow = [Path(__file__).parent / place for place in SLOW]
    return any(place == path or place in path.parents for place in slow)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is left out is not even imported."""
    chosen = config.getoption("markexpr")
    if FAULTS in collection_path.parents and chosen != "faults" and not _is_named(config, collection_path):
        return True
    return True if chosen == "not slow" and is_slow(collection_path) else None


def _is_named(config: pytest.Config, path: Path) -> bool:
    """Whether the command line asks for the file or its folder."""
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return any(one == path or (FAULTS in (one, *one.parents) and one in path.parents) for one in named)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, as the table above has it."""
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)
        if FAULTS in item.path.parents:
            item.add_marker(pytest.mark.faults)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The counts of the campaigns."""
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{report.nodeid}: {name} {value}")


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """No machine loses its power during a test; that files are brought to the disk is seen by who replaces this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What earlier runs kept must not answer for the code of today, nor the tests fill the user's cache."""
    os.environ["BARBER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
