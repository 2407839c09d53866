"""Following runs from outside. The record is the truth; a tracker only mirrors it and never costs a run."""

import logging
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from barber.errors import UserError
from barber.evals.results import AgreementResult, PerplexityResult, StageResults
from barber.model.names import PLACES, called
from barber.run.record import RunRecord
from barber.runtime.plain import plain
from barber.walk.report import BlockReport

log = logging.getLogger("barber")


class Tracker(Protocol):
    """Something that wants to be told how a run goes."""

    def check(self) -> None:
        """Refuse before anything loads, where the tracker cannot work at all."""
        ...

    def start(self, name: str, record: RunRecord, folder: Path) -> Any:
        """Begin, note where in `record.tracking`; returns what the other calls get as `run`, None: nobody listens."""
        ...

    def block(self, run: Any, number: int, block: BlockReport) -> None:
        """A block is done."""
        ...

    def finish(self, run: Any, record: RunRecord, folder: Path) -> None:
        """The run is over, well or badly; its folder has the pictures that the record names."""
        ...


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases.

    Args:
        project: the project; an agent's runs are in that of its sweep.
        entity: user or team; None: the default of the login.
        mode: `online` (offline where there is no login or no network), `offline` (synchronised later with `wandb sync`)
            or `disabled`.
    """

    project: str = "llm-barber"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"

    def check(self) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError('tracker=wandb needs wandb, install it with: pip install "llm-barber[wandb]"') from error

    def start(self, name: str, record: RunRecord, folder: Path) -> Any:
        if self.mode == "disabled":
            return None
        run = self._online(name, record, folder) if self.mode == "online" else None
        run = run or self._begin("offline", name, record, folder)
        # the block is the axis; a series' last value is no result
        run.define_metric("block", hidden=True)
        for series in ("layer", "attention/*", "mlp/*"):
            run.define_metric(series, step_metric="block", summary="none")
        path, send = run.settings.sync_dir, "wandb sync" if run.offline else "wandb sync --include-online"
        record.tracking |= {"folder": path, "sync": f"{send} {shlex.quote(path)}"}
        if run.offline:
            level = logging.WARNING if self.mode == "online" else logging.INFO
            log.log(level, "W&B has the run offline; to send it: %s", record.tracking["sync"])
        else:
            record.tracking["url"] = run.url
            log.info("W&B: %s", run.url)
        return run

    def _online(self, name: str, record: RunRecord, folder: Path) -> Any:
        """A run at the service; None if there is none to be had, without asking anybody for a key."""
        import wandb

        try:
            settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
            if not wandb.login(prompt=False, verify=False):
                raise ConnectionError("no API key; `wandb login` keeps one")
            _require_answer(settings.base_url)
            return self._begin("online", name, record, folder)
        except Exception as error:  # whatever the service, the network or the key came up with
            log.warning("W&B cannot be reached: %s.", str(error).partition("\n")[0].rstrip("."))
            return None

    def _begin(self, mode: Literal["online", "offline"], name: str, record: RunRecord, folder: Path) -> Any:
        import wandb

        groups = ("model", "pattern", "allocation", "pruner", "rebuild", "update")
        choices = {group: record.choices.get(group) or "none" for group in groups}
        choices["model"] = called(choices["model"], record.config.get("model")) or "none"
        chosen = {
            group: choice[:64] for group, choice in choices.items() if choice not in ("none", "uniform")
        }  # no tag is longer
        return wandb.init(
            project=self.project,
            entity=self.entity,
            group=record.choices.get("experiment") or "runs",
            name=point(name, record),
            job_type="_".join(chosen[group] for group in groups[2:] if group in chosen) or "dense",
            tags=list(dict.fromkeys(chosen.values())),
            config={**record.config, "choices": record.choices},
            dir=str(folder),
            mode=mode,
            # a run of the same process that could not be finished must not be taken for this one
            reinit="create_new",
            settings=wandb.Settings(silent=True, init_timeout=30, finish_timeout=60, finish_timeout_raises=True),
        )

    def block(self, run: Any, number: int, block: BlockReport) -> None:
        values = {"loss_before": block.loss_before, "loss_after": block.loss_after, "exchanges": block.exchanges}
        values |= {"seconds": block.seconds, "sparsity": block.sparsity}
        series = {f"{block.block}/{key}": value for key, value in values.items() if value is not None}
        run.log({"block": number, "layer": block.layer, **series})

    def finish(self, run: Any, record: RunRecord, folder: Path) -> None:
        import wandb

        try:
            rows = list(figures(record.results))
            logged: dict[str, Any] = {f"{stage}/{measure}/{of}": value for stage, measure, of, value, _ in rows}
            if rows:
                columns = ["stage", "measure", "text or task", "value", "standard error"]
                logged["results"] = wandb.Table(columns=columns, data=rows)
            if record.linears:
                columns = ["linear", "weights", "zeros", "exchanges"]
                data = [[name, one.weights, one.zeros, one.exchanges] for name, one in record.linears.items()]
                logged["linears"] = wandb.Table(columns=columns, data=data)
            for picture in filter(Path.is_file, (folder / file for file in record.files.values())):
                if picture.suffix == ".png":
                    logged[f"plots/{picture.stem}"] = wandb.Image(str(picture))
            if logged:
                run.log(logged)
            sparsity = plain(record.sparsity) if record.sparsity else {}
            zeros = {f"zeros/{stage}": counted.share for stage, counted in record.zeros.items()}
            run.summary.update({"status": record.status, "error": record.error, **sparsity, **zeros})
            seconds = record.seconds | {f"walk/{phase}": value for phase, value in record.walk_seconds.items()}
            run.summary.update({f"seconds/{phase}": value for phase, value in seconds.items()})
        finally:
            run.finish(exit_code=0 if record.status == "success" else 1)


class Tracking:
    """A tracker that cannot cost the run: at its first failure it is told no more, with a warning."""

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker
        self._run: Any = None
        self._folder = Path()
        self._sync: str | None = None
        self._failed = False

    def start(self, name: str, record: RunRecord, folder: Path) -> None:
        self._folder = folder
        self._run = self._call("start", name, record, folder)
        self._sync = record.tracking.get("sync")
        if record.tracking:
            record.write(folder)

    def block(self, number: int, block: BlockReport) -> None:
        if self._run is not None and not self._failed:
            self._call("block", self._run, number, block)

    def finish(self, record: RunRecord) -> None:
        if self._run is not None:  # also after a failure: what has been told is to be kept
            self._call("finish", self._run, record, self._folder)

    def _call(self, what: str, *arguments: Any) -> Any:
        if self._tracker is None:
            return None
        try:
            return getattr(self._tracker, what)(*arguments)
        except Exception as error:  # whatever the service or the network came up with
            if not self._failed:
                sentence = "Tracking stopped (%s); the run goes on, its record stays in the run folder.%s"
                log.warning(sentence, error, f" To send what was tracked: {self._sync}" if self._sync else "")
            self._failed = True
            return None


# Overrides that say where things go and what is measured, not what was tried.
_NOT_THE_POINT = frozenset(
    {"name", "experiment", "tracker", "export", "resume", "device", "data_dir", "engine", "evals", "hydra"}
)
_LONGEST_NAME = 128  # W&B takes no more


def point(name: str, record: RunRecord) -> str:
    """What tells a run from the others of its sweep: its name and the overrides, less what the name says already."""
    words = []
    for override in record.overrides:
        key, _, value = override.lstrip("+~").partition("=")
        said = (key in record.choices and value in name) or _names_the_model(key, value)
        if not said and re.split(r"[./@]", key)[0] not in _NOT_THE_POINT:
            words.append(f"{key}={value.strip(chr(39)).rpartition('/')[2]}")  # of a path, its end
    while words and len(" ".join([name, *words])) > _LONGEST_NAME:
        del words[0]
    return " ".join([name, *words])[:_LONGEST_NAME]


def _names_the_model(key: str, value: str) -> bool:
    """Whether an override says where one's own model is, after which the run is called."""
    return key == "model.path" or (key == "model" and value in PLACES)


_ERRORS = {
    "perplexity": "perplexity_standard_error",
    "nll_per_token": "nll_standard_error",
    "kl_divergence": "kl_standard_error",
    "top1_agreement": "top1_standard_error",
}


def figures(results: Mapping[str, StageResults]) -> Iterator[tuple[str, str, str, float, float | None]]:
    """The figures of a record's results: stage, measure, text or task, value, standard error."""
    for stage, found in results.items():
        measured: list[Mapping[str, PerplexityResult | AgreementResult]] = [found.perplexity, found.agreement]
        for text, result in (item for by_text in measured for item in by_text.items()):
            for measure, error in _ERRORS.items():
                if getattr(result, measure, None) is not None:
                    yield stage, measure, text, getattr(result, measure), getattr(result, error)
        if (zero_shot := found.zero_shot) is None:
            continue
        for name, task in zero_shot.tasks.items():
            for measure, value in task.metrics.items():
                if measure in ("acc", "acc_norm") or f"{measure}_stderr" in task.metrics:
                    yield stage, measure, name, value, task.metrics.get(f"{measure}_stderr")
        if zero_shot.mean_acc is not None:
            yield stage, "acc", "mean", zero_shot.mean_acc, None


def _require_answer(url: str) -> None:
    """Find out in seconds that nobody is there, which W&B's client takes minutes for; a proxy is left to the client."""
    if getproxies():
        return
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), timeout=5).close()
