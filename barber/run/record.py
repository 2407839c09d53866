"""The record of a run: everything that is needed to trust its figures, as JSON, written atomically."""

import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from barber.runtime.files import written_whole

FILE = "record.json"
_PACKAGES = (
    "llm-barber",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "hydra-core",
    "numpy",
    "datasets",
    "lm-eval",
)


@dataclass
class RunRecord:
    """What a run was told to do, what it ran on, and what came out.

    `status` is `started` from the beginning, and `success` or `failed` at the end; a record that says `started` long
    after is that of a run that was killed.

    Args:
        config: the resolved config.
        overrides: the command line's share in it.
        choices: the chosen option of every config group, `experiment` among them.
        digest: of the config, see `identity.digest_of`.
        tracking: where a tracker keeps the run.
        machine: device, threads, batch size, precision; `peak_memory_bytes` is that of the walk.
        initial: whether the initial masks were `known` from another run, and the `seconds` that computing them took
            then or now; None: nothing was kept.
    """

    config: dict[str, Any]
    overrides: list[str]
    choices: dict[str, str | None] = field(default_factory=dict)
    digest: str = ""
    tracking: dict[str, str] = field(default_factory=dict)
    status: Literal["started", "success", "failed"] = "started"
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    finished: str | None = None
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    git: dict[str, Any] | None = field(default_factory=lambda: git_revision())
    machine: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int | None] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    resumed: dict[str, Any] | None = None
    initial: dict[str, Any] | None = None
    sparsity: dict[str, Any] | None = None
    linears: dict[str, dict[str, int]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    walk_seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    traceback: str | None = None

    def write(self, folder: Path) -> None:
        """Write record.json, whole or not at all."""
        with written_whole(folder / FILE) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=2, allow_nan=False), encoding="utf-8")

    def finish(self, status: Literal["success", "failed"], folder: Path) -> None:
        """Close the record."""
        self.status = status
        self.finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.write(folder)


def successful(folder: Path) -> dict[str, Any] | None:
    """The record of the run that succeeded in a folder; None if there is none."""
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("status") == "success" else None


def folder_of_job(sweep: Path, name: str, digest: str) -> Path:
    """Where a job of a sweep is, or is to go: found by its digest alone, finished ones first, else NAME-DIGEST.

    Args:
        digest: of the job's config, as many characters of it as folders' names have.
    """
    own = sweep / f"{name}-{digest}"
    there = sorted(folder for folder in sweep.glob(f"*-{digest}") if folder.is_dir())
    return next((folder for folder in there if successful(folder)), own if own in there or not there else there[0])


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> dict[str, Any] | None:
    """Commit of this code and whether files differ from it; None where it is not in a git checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # installed into somebody else's repository
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
