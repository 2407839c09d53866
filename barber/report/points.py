"""Points of a table: what runs that differ in nothing but the seed have in common."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from barber.report.measures import Figure
from barber.report.records import Protocol, Run, last_part

DENSE = "Dense"


@dataclass(frozen=True)
class Mean:
    """A figure over seeds, with its sample standard deviation where there are several.

    Args:
        error: the standard error of a single value, over windows or documents, where it is on record.
    """

    values: tuple[float, ...]
    error: float | None = None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)


@dataclass(frozen=True)
class Point:
    """A method on a model and a pattern with its settings, over seeds.

    Args:
        pattern: as in `Run.pattern`; empty for the dense model.
        settings: those that vary over the runs.
        protocols: of every text's perplexity.
        runs: one a seed; the figures of a dense point are those of their dense stage.
    """

    model: str
    method: str
    pattern: str
    settings: Mapping[str, Any]
    protocols: Mapping[str, Protocol]
    runs: Sequence[Run]
    stage: str | None
    perplexity: Mapping[str, Mean] = field(default_factory=dict)
    accuracy: Mean | None = None

    @property
    def dense(self) -> bool:
        """Whether this is the unpruned model."""
        return self.method == DENSE

    @property
    def zero_shot(self) -> dict[str, Any]:
        """The zero-shot results of the first run, for what they were measured on."""
        return self.runs[0].at(self.stage).get("zero_shot") or {}

    @property
    def machine(self) -> str:
        """What the seconds were taken on."""
        return "; ".join(dict.fromkeys(run.machine for run in self.runs))

    @property
    def walk(self) -> Mean | None:
        """Seconds of the walk, over the runs that walked through all layers in one go."""
        runs = [run for run in self.runs if not run.resumed] or self.runs
        known = tuple(run.walk_seconds for run in runs if run.walk_seconds is not None)
        return None if self.dense or not known else Mean(known)

    @property
    def memory(self) -> int | None:
        """The most bytes that one of the runs held."""
        known = [run.peak_memory for run in self.runs if run.peak_memory is not None]
        return None if self.dense else max(known, default=None)


def method_of(run: Run) -> str:
    """What tables call the method that a run's last figures are of."""
    pruner, steps = run.config.get("pruner"), list(run.steps.values())
    if not pruner:
        return DENSE
    allocation = run.config.get("allocation")
    name = last_part(pruner) + (" (permuted inputs)" if pruner.get("permute") else "")
    tail = f", {last_part(allocation)}" if allocation else ""
    if not steps or run.stage == "pruned":
        return (f"{name} (update)" if name == "SparseGPT" else name) + tail
    if name == "SparseGPT" and len(steps) == 1 and _drops_the_update(steps[0]):
        return f"{name} (mask only){tail}"
    updated = ", with reconstruction" if run.config.get("update") else ""
    return name + tail + "".join(f" + {_step(step)}" for step in steps) + updated


def _drops_the_update(step: Mapping[str, Any]) -> bool:
    """Whether a step leaves the pruner's mask on the dense weights."""
    return step.get("alpha") == 0 and not step.get("retain_reconstruction")


def _step(step: Mapping[str, Any]) -> str:
    """What tables call a step of the rebuilding, or an update of the weights."""
    details = [
        f"{step[key]:g}" if isinstance(step[key], float) else str(step[key])
        for key in ("granularity", "alpha")
        if key in step
    ]
    if (rounds := step.get("rounds", 1)) != 1 and "alpha" in step:
        details.append(f"{rounds} rounds")
    if step.get("follow"):
        details.append(f"follow {step['follow']:g}")
    if step.get("nm_exchange", "row") != "row":
        details.append(f"{step['nm_exchange']} pairs")
    if step.get("retain_reconstruction"):
        details.append("update kept")
    if (metric := last_part(step.get("metric") or {})) not in ("", "WeightGradient"):
        details.append(metric)
    return last_part(step) + (f" ({', '.join(details)})" if details else "")


def varying(runs: Sequence[Run]) -> list[str]:
    """The settings that have more than one value over the runs that have them."""
    values: dict[str, set[Any]] = {}
    for run in runs:
        for key, value in run.settings.items():
            if value is not None:
                values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def points(runs: Sequence[Run]) -> list[Point]:
    """One point a model, method, pattern, setting and protocol; first the dense one of every model."""
    keys = varying(runs)
    grouped: dict[tuple[Any, ...], dict[str, Run]] = {}
    for run in runs:
        method = method_of(run)
        if method != DENSE and run.stage != "dense":
            settings = tuple((key, run.settings.get(key)) for key in keys)
            group = (run.model, method, run.pattern, settings, _protocols(run, run.stage))
            grouped.setdefault(group, {})[run.seed] = run  # of the same settings and seed the later one counts
    pruned = [_point(group, list(seeds.values())) for group, seeds in grouped.items()]
    return sorted([*_dense(runs, keys), *pruned], key=_order)


def majority(found: Sequence[Point]) -> dict[tuple[str, str], Protocol]:
    """The protocol of most points, by model and text: digests are of token ids, so models never share one."""
    counts: dict[tuple[str, str], Counter[Protocol]] = {}
    for point in found:
        for text, protocol in point.protocols.items():
            counts.setdefault((point.model, text), Counter())[protocol] += 1
    return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}


def comparable(found: Sequence[Point], text: str) -> list[Point]:
    """Those whose perplexity of a text was measured by the protocol of most."""
    usual = majority(found)
    return [p for p in found if text in p.perplexity and p.protocols[text] == usual[p.model, text]]


def _point(group: tuple[Any, ...], runs: list[Run]) -> Point:
    model, method, pattern, settings, protocols = group
    stage = runs[-1].stage
    texts = {text: _mean([run.perplexity(stage, text) for run in runs]) for text, _ in protocols}
    perplexity = {text: mean for text, mean in texts.items() if mean}
    accuracy = _mean([run.accuracy(stage) for run in runs])
    return Point(model, method, pattern, dict(settings), dict(protocols), runs, stage, perplexity, accuracy)


def _dense(runs: Sequence[Run], keys: Sequence[str]) -> list[Point]:
    """The dense model is the same in all runs: of equal protocols the latest run counts, one with accuracies first."""
    best: dict[tuple[str, frozenset[Any]], Run] = {}
    for run in sorted(runs, key=lambda run: "zero_shot" in run.at("dense")):
        if "dense" in run.results:
            best[run.model, frozenset(_protocols(run, "dense"))] = run
    found = []
    for (model, protocols), run in best.items():
        if not any(model == other and protocols < more for other, more in best):
            texts = dict(_protocols(run, "dense"))
            perplexity = {text: mean for text in texts if (mean := _mean([run.perplexity("dense", text)]))}
            settings = {key: run.settings.get(key) for key in keys if key.startswith("evals.")}
            accuracy = _mean([run.accuracy("dense")])
            found.append(Point(model, DENSE, "", settings, texts, [run], "dense", perplexity, accuracy))
    return found


def _protocols(run: Run, stage: str | None) -> tuple[tuple[str, Protocol], ...]:
    return tuple(run.protocols(stage).items())


def _mean(figures: Sequence[Figure | None]) -> Mean | None:
    known = [figure for figure in figures if figure is not None]
    if not known:
        return None
    return Mean(tuple(figure.value for figure in known), known[0].error if len(known) == 1 else None)


_PRUNERS = ("Dense", "Magnitude", "Wanda", "SparseGPT")


def _order(point: Point) -> tuple[Any, ...]:
    """Models, the dense one first, unstructured before N:M, the initial mask before what is made of it."""
    pruner = point.method.split(" ")[0]
    rank = _PRUNERS.index(pruner) if pruner in _PRUNERS else len(_PRUNERS)
    sparsity = point.runs[0].sparsity or 0.0
    settings = [str(value) for value in point.settings.values()]
    return (
        point.model,
        not point.dense,
        ":" in point.pattern,
        sparsity,
        point.pattern,
        rank,
        pruner,
        "+" in point.method,
        point.method,
        settings,
    )
