"""Records as runs leave them, in which tests change what they are about."""

import math
from dataclasses import replace
from typing import Any

from barber.evals.results import (
    AgreementResult,
    PerplexityResult,
    SampleResult,
    StageResults,
    TaskResult,
    TextProtocol,
    ZeroShotResult,
)
from barber.run.record import (
    Calibration,
    Git,
    Initial,
    LinearCounts,
    Machine,
    Resumed,
    RunRecord,
    Seeds,
    Sparsity,
)

PROTOCOL = TextProtocol("a file", text_tokens=75, seqlen=16, stride=16, bos=False, max_windows=None, separator="\n\n")


def perplexity(value: float, **changes: Any) -> PerplexityResult:
    """A result on four windows."""
    loss = math.log(value)
    return replace(PerplexityResult(value, 0.5, loss, 0.5 / value, 4, 60, PROTOCOL, "9f"), **changes)


AGREEMENT = AgreementResult(0.25, 0.01, 0.75, 0.02, {"0.attention": 0.1, "0.mlp": None}, 10, 4, 60, PROTOCOL, "9f")
ZERO_SHOT = ZeroShotResult(
    tasks={
        "boolq": TaskResult({"acc": 0.5, "acc_stderr": 0.1}, 2.0, 0, 10, 20, "4e", "a file"),
        "wsc": TaskResult({"em": 1, "em_stderr": 0}, "N/A", None),
    },
    mean_acc=0.5,
    mean_of=("boolq",),
    limit=10,
    lm_eval="0.4.13",
)


def measured(value: float) -> StageResults:
    """Everything that there is to measure of a stage."""
    sample = SampleResult("It is", " a truth", 2)
    return StageResults({"text": perplexity(value)}, {"text": AGREEMENT}, ZERO_SHOT, sample)


def record(**changes: Any) -> RunRecord:
    """A run that pruned and measured."""
    whole: dict[str, Any] = {
        "config": {"seed": 0, "rebuild": {"barber": {"_target_": "barber.Barber", "alpha": 0.1}}, "pruner": {"x": 1}},
        "overrides": ["pruner=wanda"],
        "choices": {"pruner": "wanda", "experiment": None},
        "digest": "d1",
        "tracking": {"url": "there"},
        "status": "success",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        "versions": {"torch": "2.6"},
        "git": Git("abc123", dirty=False),
        "machine": Machine("cpu", 2, "Linux", None, 8, 1, ("float32", "float32"), 1000),
        "seeds": Seeds(0, 1),
        "calibration": Calibration("c4", 16, 64, "c1"),
        "resumed": Resumed("outputs/before", 1),
        "initial": Initial(known=True, seconds=1.5),
        "sparsity": Sparsity(0.5, 50, 100, 7),
        "linears": {"layers.0.q": LinearCounts(100, 50, 7)},
        "results": {"dense": StageResults({"text": perplexity(18.0)}), "rebuilt": measured(20.0)},
        "seconds": {"walk": 4.5},
        "walk_seconds": {"compare": 3.0, "exchange": 1.0},
        "files": {"loss": "loss.png"},
        "error": None,
    }
    return RunRecord(**whole | changes)
