"""What a record has of a stage of the model, figure by figure."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """What was measured, and its standard error where that is known."""

    value: float
    error: float | None = None

    def percent(self) -> "Figure":
        """A share times a hundred."""
        return Figure(100 * self.value, None if self.error is None else 100 * self.error)

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}}" + ("" if self.error is None else f" ± {self.error:{form}}")


def measures(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every figure of a stage with its standard error, by what it is; a star: not all documents were asked."""
    for text, found in results.get("perplexity", {}).items():
        if found["perplexity"] is not None:
            yield f"perplexity, {text}", f"{Figure(found['perplexity'], found['perplexity_standard_error']):.2f}"
    for text, found in results.get("agreement", {}).items():
        divergence = Figure(found["kl_divergence"], found["kl_standard_error"])
        same = Figure(found["top1_agreement"], found["top1_standard_error"])
        yield f"KL divergence from dense, {text}", f"{divergence:.3f}"
        yield f"same likeliest token as dense, {text} (%)", f"{same.percent():.1f}"
    zero_shot = results.get("zero_shot") or {"tasks": {}}
    star = "*" if zero_shot.get("limit") else ""
    for task, found in zero_shot["tasks"].items():
        for metric in ("acc", "acc_norm"):
            if metric in found:
                yield f"{metric}{star}, {task} (%)", f"{Figure(found[metric], _error(found, metric)).percent():.1f}"
    if mean := mean_accuracy(zero_shot):
        yield f"acc{star}, mean of the {len(zero_shot['mean_of'])} (%)", f"{mean.percent():.2f}"


def mean_accuracy(zero_shot: Mapping[str, Any]) -> Figure | None:
    """Over the tasks, where it was measured; its error is that of documents that are independent of each other."""
    if zero_shot.get("mean_acc") is None:
        return None
    errors = [_error(zero_shot["tasks"].get(task, {}), "acc") for task in zero_shot.get("mean_of") or []]
    known = [error for error in errors if error is not None]
    whole = known and len(known) == len(errors)
    return Figure(zero_shot["mean_acc"], math.hypot(*known) / len(known) if whole else None)


def zeros(record: Mapping[str, Any], stage: str) -> str:
    """The share of zeros that was counted; older records know that of the last stage alone."""
    if counted := (record.get("zeros") or {}).get(stage):
        return f"{counted['zeros'] / counted['weights']:.2%}"
    return f"{record['sparsity']['sparsity']:.2%}" if record["sparsity"] and stage == [*record["results"]][-1] else "–"


def _error(task: Mapping[str, Any], metric: str) -> float | None:
    error = task.get(f"{metric}_stderr")
    return error if isinstance(error, int | float) else None  # the harness may say N/A
