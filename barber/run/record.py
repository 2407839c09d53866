"""The record of a run: everything that is needed to trust its figures, as JSON, written atomically."""

import json
import platform
import subprocess
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from barber.evals.results import StageResults
from barber.runtime.files import written_whole
from barber.runtime.plain import key_of, plain
from barber.runtime.seals import digest_of, sealed

FILE = "record.json"
VERSION = 3
"""Of the record's form; one more whenever a key changes or goes, and `reading` then knows the form before, too."""

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


@dataclass(frozen=True)
class Git:
    """The commit of the package's code, and whether files differ from it."""

    commit: str
    dirty: bool


@dataclass(frozen=True)
class Machine:
    """What a run computes on; None where it is not known yet, or is not of the run.

    Args:
        device, gpu: torch's name of the device, and the maker's of the GPU.
        threads: torch's on the CPU.
        batch_size: samples that the walk takes through a block together.
        processes: that share the samples.
        precision: kinds of arithmetic, of forward passes and of gradients.
        peak_memory_bytes: of the walk.
    """

    device: str | None = None
    threads: int | None = None
    platform: str | None = None
    gpu: str | None = None
    batch_size: int | None = None
    processes: int | None = None
    precision: tuple[str, ...] | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Seeds:
    """The run's seed, and that of the calibration set; None: it is not drawn."""

    run: int
    calibration: int | None


@dataclass(frozen=True)
class Calibration:
    """The calibration set: where it is from, its samples of `seqlen` tokens each, SHA-256 of their ids.

    Args:
        distinct: samples that are not a repetition of another; None: written before they were counted.
    """

    source: str
    samples: int
    seqlen: int
    digest: str
    distinct: int | None = None

    @property
    def repeats(self) -> bool:
        """Whether there are fewer samples than were asked for, some of them several times."""
        return self.distinct is not None and self.distinct < self.samples

    def __str__(self) -> str:
        """What it is in words: `128 samples of 32 tokens (14 distinct) from a text`."""
        distinct = f" ({self.distinct} distinct)" if self.repeats else ""
        return f"{self.samples} samples of {self.seqlen} tokens{distinct} from {self.source}"


@dataclass(frozen=True)
class Resumed:
    """The run folder that finished layers were taken from, and how many."""

    from_: str
    layers: int


@dataclass(frozen=True)
class Initial:
    """Initial masks: whether they were known from another run, and the seconds that computing them took then or now."""

    known: bool
    seconds: float | None


@dataclass(frozen=True)
class Sparsity:
    """All pruned linears together: the share of exact zeros, their number, the weights, the pairs exchanged.

    Args:
        overall: the share of zeros in all linears of the decoder layers; None: none of them was left out.
    """

    sparsity: float
    zeros: int
    weights: int
    exchanges: int
    overall: float | None = None


@dataclass(frozen=True)
class Zeros:
    """The exact zeros of a stage of the model among the weights of all linears of its decoder layers."""

    zeros: int
    weights: int

    @property
    def share(self) -> float:
        """Of all weights."""
        return self.zeros / self.weights


@dataclass(frozen=True)
class LinearCounts:
    """A linear's weights, the exact zeros among them, the pairs exchanged.

    Args:
        dense_zeros, pruned_zeros: of the dense model and with the initial mask; None: written before they were counted.
    """

    weights: int
    zeros: int
    exchanges: int
    dense_zeros: int | None = None
    pruned_zeros: int | None = None


@dataclass(kw_only=True)
class RunRecord:
    """What a run was told to do, what it ran on, and what came out.

    `status` is `started` from the beginning, and `success` or `failed` at the end; a record that says `started` long
    after is that of a run that was killed.

    Args:
        version: of the record's form.
        config: the resolved config.
        overrides: the command line's share in it.
        choices: the chosen option of every config group, `experiment` among them.
        digest: of the config, see `identity.digest_of`; empty in the oldest records.
        tracking: where a tracker keeps the run.
        started, finished: ISO 8601 in UTC.
        versions: of Python and of the packages that figures depend on.
        git: None: the code is in no checkout.
        initial: None: nothing was kept.
        sparsity, linears: None and empty: nothing was pruned.
        zeros: by stage of the model; of none that was not counted.
        results: by stage of the model.
        seconds, walk_seconds: by phase of the run, and of its walk over the decoder layers.
        files: what lies beside the record, by what it is.
        digests: SHA-256 of files there, by their names.
    """

    version: int = VERSION
    config: dict[str, Any]
    overrides: list[str]
    choices: dict[str, str | None] = field(default_factory=dict)
    digest: str = ""
    tracking: dict[str, str] = field(default_factory=dict)
    status: Literal["started", "success", "failed"]
    started: str
    finished: str | None
    versions: dict[str, str]
    git: Git | None
    machine: Machine
    seeds: Seeds | None
    calibration: Calibration | None
    resumed: Resumed | None = None
    initial: Initial | None = None
    sparsity: Sparsity | None
    linears: dict[str, LinearCounts] = field(default_factory=dict)
    zeros: dict[str, Zeros] = field(default_factory=dict)
    results: dict[str, StageResults]
    seconds: dict[str, float]
    walk_seconds: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    error: str | None
    traceback: str | None = None

    @classmethod
    def begin(
        cls,
        config: dict[str, Any],
        overrides: list[str],
        choices: dict[str, str | None] | None = None,
        digest: str = "",
    ) -> "RunRecord":
        """The record of a run that begins here and now."""
        return cls(
            config=config,
            overrides=overrides,
            choices=choices or {},
            digest=digest,
            status="started",
            started=_now(),
            finished=None,
            versions=package_versions(),
            git=git_revision(),
            machine=Machine(),
            seeds=None,
            calibration=None,
            sparsity=None,
            results={},
            seconds={},
            walk_seconds={},
            error=None,
        )

    def content(self) -> dict[str, Any]:
        """What record.json holds: every field, and of the parts what is known."""
        return {key_of(one): plain(getattr(self, one.name)) for one in fields(self)}

    def write(self, folder: Path) -> None:
        """Write record.json, whole or not at all, with its own digest in it."""
        with written_whole(folder / FILE) as unfinished:
            content = sealed(self.content())
            unfinished.write_text(json.dumps(content, indent=2, allow_nan=False), encoding="utf-8")

    def note_digest(self, file: Path) -> None:
        """Keep the digest of a file beside the record."""
        self.digests[file.name] = digest_of(file)

    def finish(self, status: Literal["success", "failed"], folder: Path) -> None:
        """Close the record."""
        self.status = status
        self.finished = _now()
        self.write(folder)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> Git | None:
    """Commit of this code and whether files differ from it; None where it is not in a git checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # installed into somebody else's repository
            return None
        return Git(git("rev-parse", "HEAD"), bool(git("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
