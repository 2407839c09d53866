"""Everything that a run consists of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from barber.data.calibration import Calibration
from barber.errors import require_counts
from barber.evals.evaluation import Evaluation
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.model.engine import Engine
from barber.model.sources import ModelSource
from barber.run.export import HuggingFaceFolder, MaskFile
from barber.run.tracking import Tracker
from barber.runtime.cache import Cache
from barber.runtime.precision import Precision
from barber.walk.allocation import Allocation
from barber.walk.walk import Schedule


@dataclass(frozen=True)
class Experiment:
    """Everything a run consists of; a component that is None is left out.

    Args:
        name: what people call it.
        skip: the linears that stay dense, as in `prune`.
        rebuild: the steps of the rebuilding by name, in order.
        allocation: how sparse each linear becomes; None: all alike.
        update: the steps that give kept weights new values, by name, in order; None: no weight is changed.
        device: `auto`, `cpu`, `cuda` or `cuda:INDEX`.
        batch_size: samples that go through a layer together; None: as many as fit comfortably.
        precision: of the walk's matrix products.
        schedule: `paper`, or `interleaved`: initial masks on the inputs that the rebuilding has.
        engine: what is kept where.
        resume: `auto`: a run that exports or streams keeps its finished layers until it is done, and goes on with those
            of the same run that was interrupted, if the model's files have size and time that they had; `verify`: if
            they hold what they held; `never`: it does neither.
        cache: keeps for other runs what they would compute alike; None: nothing is kept or taken.
        seed: of everything random that has no seed of its own.
        threads: of the CPU, for torch; None: as many as there are. Their number changes the last bits of sums.
    """

    name: str
    model: ModelSource
    pattern: Pattern
    calibration: Calibration
    pruner: Pruner | None
    rebuild: Mapping[str, Rebuild] | None
    evals: Evaluation | None
    tracker: Tracker | None
    export: HuggingFaceFolder | MaskFile | None
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    batch_size: int | None = None
    precision: Precision = field(default_factory=Precision)
    schedule: Schedule = "paper"
    engine: Engine = field(default_factory=Engine)
    resume: Literal["auto", "verify", "never"] = "auto"
    cache: Cache | None = None
    update: Mapping[str, Rebuild] | None = None
    allocation: Allocation | None = None
    skip: Sequence[int | str] = ()

    @property
    def steps(self) -> dict[str, Rebuild]:
        """What is done to the initial masks, in order, by the config key."""
        steps = {f"rebuild.{name}": step for name, step in (self.rebuild or {}).items()}
        return steps | {f"update.{name}": step for name, step in (self.update or {}).items()}

    def __post_init__(self) -> None:
        require_counts(self, "batch_size")
        require_counts(self, "threads", most=1024)
