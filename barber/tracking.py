"""Following runs from outside. The record is the truth; a tracker only mirrors it and never costs a run."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from barber.api import BlockReport
from barber.errors import UserError
from barber.record import RunRecord

log = logging.getLogger("barber")


class Tracker(Protocol):
    """Something that wants to be told how a run goes."""

    def check(self) -> None:
        """Refuse before anything loads, where the tracker cannot work at all."""
        ...

    def start(self, name: str, config: dict[str, Any], folder: Path) -> Any:
        """Begin; returns what the other calls are given as `run`."""
        ...

    def block(self, run: Any, number: int, block: BlockReport) -> None:
        """A block is done."""
        ...

    def finish(self, run: Any, record: RunRecord) -> None:
        """The run is over, well or badly."""
        ...


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases.

    Args:
        project: the project.
        entity: user or team; None: the default of the login.
        mode: `online`, `offline` (synchronised later with `wandb sync`) or `disabled`.
    """

    project: str = "llm-barber"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"

    def check(self) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError('tracker=wandb needs wandb, install it with: pip install "llm-barber[wandb]"') from error

    def start(self, name: str, config: dict[str, Any], folder: Path) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            entity=self.entity,
            name=name,
            config=config,
            dir=str(folder),
            mode=self.mode,
            settings=wandb.Settings(silent=True, init_timeout=60),
        )

    def block(self, run: Any, number: int, block: BlockReport) -> None:
        values = {"loss_before": block.loss_before, "loss_after": block.loss_after, "exchanges": block.exchanges}
        values |= {"seconds": block.seconds, "sparsity": block.sparsity}
        run.log({f"{block.block}/{key}": value for key, value in values.items() if value is not None}, step=number)

    def finish(self, run: Any, record: RunRecord) -> None:
        run.summary.update({"status": record.status, "sparsity": record.sparsity, "results": record.results})
        run.finish(exit_code=0 if record.status == "success" else 1)


class Tracking:
    """A tracker that cannot cost the run: at its first failure it is dropped with a warning."""

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker
        self._run: Any = None

    def start(self, name: str, config: dict[str, Any], folder: Path) -> None:
        self._run = self._call("start", name, config, folder)

    def block(self, number: int, block: BlockReport) -> None:
        self._call("block", self._run, number, block)

    def finish(self, record: RunRecord) -> None:
        self._call("finish", self._run, record)

    def _call(self, what: str, *arguments: Any) -> Any:
        if self._tracker is None:
            return None
        try:
            return getattr(self._tracker, what)(*arguments)
        except Exception as error:  # whatever the service or the network came up with
            log.warning("Tracking stopped (%s); the run goes on, its record stays in the run folder.", error)
            self._tracker = None
            return None
