"""barber doctor: what a run would find on this machine."""

import os
import platform
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from barber.errors import UserError

_PACKAGES = ("llm-barber", "torch", "transformers", "safetensors", "datasets", "hydra-core", "omegaconf")
# What each extra brings, by the package that is asked for.
_EXTRAS = {
    "demo": ("gguf", "gensim"),
    "wandb": ("wandb",),
    "zero-shot": ("lm-eval",),
    "sweeps": ("hydra-joblib-launcher", "hydra-optuna-sweeper", "hydra-submitit-launcher"),
}
_SECONDS = 3.0


def main(arguments: list[str]) -> int:
    """Print it.

    Raises:
        UserError: something was given.
    """
    if arguments:
        raise UserError(f"barber doctor takes nothing, not {' '.join(arguments)}")
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    for name, found in (*_versions(), *_devices(), *_reached(), *_extras(), *_rooms()):
        table.add_row(name, found)
    Console(highlight=False, markup=False).print(table)
    return 0


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    return [("python", platform.python_version()), *((name, installed(name) or "not installed") for name in _PACKAGES)]


def _devices() -> list[tuple[str, str]]:
    import torch

    gpus = [
        f"{torch.cuda.get_device_name(index)}, {torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ]
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return [("device", gpu) for gpu in gpus] + [("device", f"cpu, {threads}")]


def _reached() -> list[tuple[str, str]]:
    from huggingface_hub import constants

    host = constants.ENDPOINT.partition("://")[2].partition("/")[0]
    name, _, port = host.partition(":")
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        with socket.create_connection((name, int(port or 443)), timeout=_SECONDS):
            return [("hub", f"{host} answers")]
    except OSError as error:
        advice = "models from folders, packages or the hub's cache; data sets with data_dir=FOLDER"
        return [("hub", f"not reached ({error}): {advice}")]


def _extras() -> list[tuple[str, str]]:
    rows = []
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if installed(package) is None]
        there = ", ".join(f"{package} {installed(package)}" for package in packages if package not in missing)
        rows.append((f"extra {extra}", f'pip install "llm-barber[{extra}]"' if missing else there))
    return rows


def _rooms() -> list[tuple[str, str]]:
    """The disks of the run folders and of what is kept."""
    from huggingface_hub import constants

    kept = Path(os.environ.get("BARBER_CACHE", "~/.cache/barber")).expanduser()
    places = {"outputs": Path.cwd(), "BARBER_CACHE": kept, "HF_HOME": Path(constants.HF_HOME)}
    rows = []
    for name, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        rows.append((f"disk of {name}", f"{shutil.disk_usage(there).free / 2**30:.1f} GiB free at {place}"))
    return rows
