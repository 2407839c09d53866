"""The records of runs, and what a table needs to know of each."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from barber.model.names import PLACES, own_name
from barber.report import sources
from barber.report.measures import Figure, mean_accuracy
from barber.run.identity import counts

STAGES = ("rebuilt", "pruned", "dense")
_CALIBRATION_SOURCE = frozenset(["dataset", "config", "split", "revision", "windows", "separator", "column"])


@dataclass(frozen=True)
class Broken:
    """A run without figures: it failed, was interrupted, is under way, or its record cannot be read.

    Args:
        experiment: as in `Run.experiment`.
    """

    name: str
    status: str
    error: str
    experiment: str | None = None


@dataclass(frozen=True)
class Protocol:
    """How a perplexity was measured; figures are comparable where these are equal."""

    seqlen: int
    stride: int
    bos: bool
    first_windows: int | None
    digest: str

    def __str__(self) -> str:
        limit = "all windows" if self.first_windows is None else f"the first {self.first_windows} windows"
        extras = (f", stride {self.stride}" if self.stride != self.seqlen else "") + (", BOS" if self.bos else "")
        return f"{limit} of {self.seqlen} tokens{extras}, text {self.digest[:8]}"


@dataclass(frozen=True)
class Run:
    """A record and where it comes from.

    Args:
        name: as in `sources.Found`, like `folder`.
        model: what tables call the model.
    """

    name: str
    model: str
    record: dict[str, Any]
    folder: Path | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        config: dict[str, Any] = self.record["config"]
        return config

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """The steps of the rebuilding by name, in order; last the update of the weights."""
        return {**(self.config.get("rebuild") or {}), **(self.config.get("update") or {})}

    @property
    def results(self) -> dict[str, Any]:
        """What was measured, by stage of the model."""
        return self.record.get("results") or {}

    @property
    def experiment(self) -> str | None:
        """The experiment that was chosen, by the name of its config."""
        return (self.record.get("choices") or {}).get("experiment")

    @property
    def stage(self) -> str | None:
        """The last stage of the model that was measured."""
        return next((stage for stage in STAGES if stage in self.results), None)

    def at(self, stage: str | None) -> dict[str, Any]:
        """What was measured at a stage."""
        return (self.results.get(stage) or {}) if stage else {}

    @property
    def seed(self) -> str:
        """The run's seed, and the calibration's where it is another one."""
        seeds = dict.fromkeys((self.config.get("seed"), (self.config.get("calibration") or {}).get("seed")))
        return "/".join(str(seed) for seed in seeds if seed is not None)

    @property
    def identity(self) -> str:
        """Equal for runs with the same settings."""
        return self.record.get("digest") or json.dumps(
            {key: value for key, value in self.config.items() if key != "name"}, sort_keys=True
        )

    @property
    def pattern(self) -> str:
        """`50%` for an unstructured sparsity, `2:4` for N:M."""
        pattern = self.config.get("pattern") or {}
        return pattern_name(pattern.get("sparsity"), pattern.get("n"), pattern.get("m"))

    @property
    def sparsity(self) -> float | None:
        """Share of zeros that was asked for."""
        pattern = self.config.get("pattern") or {}
        if "m" in pattern:
            return 1 - float(pattern["n"]) / float(pattern["m"])
        return pattern.get("sparsity")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What figures depend on beside model, method, pattern and seed, by full key."""
        found = dict(_settings(self.config))
        machine = self.record.get("machine") or {}
        if precision := machine.get("precision"):
            found = {key: value for key, value in found.items() if not key.startswith("precision.")}
            found["precision"] = "/".join(dict.fromkeys(precision))
        found["device"] = machine.get("device", found.get("device"))
        found["calibration"] = self.calibration_source
        return found

    @property
    def calibration_source(self) -> str | None:
        """What the calibration samples are drawn from, by the name of its config where that is known."""
        calibration = self.config.get("calibration")
        if not calibration:
            return None
        chosen = (self.record.get("choices") or {}).get("calibration")
        if chosen and chosen not in ("hub", "text", "tokens"):
            return str(chosen)
        source = calibration.get("dataset") or calibration.get("path")
        name = Path(str(source)).name if source else last_part(calibration)
        return {"wikitext": "wikitext2", "ptb_text_only": "ptb"}.get(name, name)

    @property
    def calibration(self) -> str | None:
        """Size and source of the calibration set, `128 x 2048 c4`."""
        drawn = self.record.get("calibration") or self.config.get("calibration")
        if not drawn:
            return None
        samples = drawn.get("samples", drawn.get("nsamples"))
        distinct = drawn.get("distinct", samples)
        repeats = f" ({distinct} distinct)" if distinct != samples else ""
        return f"{samples} x {drawn.get('seqlen')} {self.calibration_source}{repeats}"

    @property
    def dense_zeros(self) -> float | None:
        """Share of zeros that the dense model had, where they were counted."""
        counted = (self.record.get("zeros") or {}).get("dense")
        return counted["zeros"] / counted["weights"] if counted else None

    @property
    def walk_seconds(self) -> float | None:
        """Seconds of the pass over the decoder layers and of what comes before it, as if the run had computed all."""
        walk = (self.record.get("seconds") or {}).get("walk")
        return None if walk is None else walk + sum(self._before.values())

    @property
    def phases(self) -> dict[str, float]:
        """The same seconds by phase; `other` has the gradients of the whole model's loss, where a pruner wants them."""
        phases = self.record.get("walk_seconds") or {}
        other = (self.walk_seconds or 0.0) - sum(self._before.values()) - sum(phases.values())
        return self._before | phases | ({"other": other} if other > 1 else {})

    @property
    def _before(self) -> dict[str, float]:
        """Seconds that are not in the record's walk; initial masks known from another run cost what they cost there."""
        initial = self.record.get("initial") or {}
        found = {"allocation": (self.record.get("seconds") or {}).get("allocate")}
        if initial.get("known"):
            found["initial masks, in another run"] = initial.get("seconds")
        return {name: seconds for name, seconds in found.items() if seconds}

    @property
    def commit(self) -> str:
        """Of the code that ran."""
        git = self.record.get("git") or {}
        return f"{git.get('commit', 'unknown')}{' with changes' if git.get('dirty') else ''}"

    @property
    def machine(self) -> str:
        """What the run ran on, in words: seconds on one machine are not those on another."""
        machine = self.record.get("machine") or {}
        threads = f"{machine['threads']} threads" if machine.get("threads") else None
        known = (machine.get("gpu") or machine.get("device"), threads)
        return ", ".join(str(part) for part in known if part) or "unknown machine"

    @property
    def peak_memory(self) -> int | None:
        """The most bytes that the run held, where they were recorded."""
        return (self.record.get("machine") or {}).get("peak_memory_bytes")

    @property
    def resumed(self) -> bool:
        """Whether the run went on with layers of an interrupted one; same figures, but fewer seconds."""
        return bool(self.record.get("resumed"))

    def protocols(self, stage: str | None) -> dict[str, Protocol]:
        """How the perplexity of every text was measured at a stage."""
        found = self.at(stage).get("perplexity") or {}
        return {text: _protocol(one) for text, one in found.items() if one.get("perplexity")}

    def perplexity(self, stage: str | None, text: str) -> Figure:
        """That of a text among `protocols`."""
        found = self.at(stage)["perplexity"][text]
        return Figure(found["perplexity"], found.get("perplexity_standard_error"))

    def accuracy(self, stage: str | None) -> Figure | None:
        """The mean over zero-shot tasks, where it was measured."""
        return mean_accuracy(self.at(stage).get("zero_shot") or {})

    def blocks(self) -> list[dict[str, Any]]:
        """The lines of layers.jsonl; one that a kill cut off does not count."""
        found = []
        for line in self._text("layers.jsonl").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def log_tail(self, lines: int = 40) -> str:
        """The end of run.log."""
        return "\n".join(self._text("run.log").splitlines()[-lines:])

    def _text(self, file: str) -> str:
        """Of a file in the run's folder; empty where there is none, as for a run of a table."""
        try:
            return (self.folder / file).read_text(encoding="utf-8", errors="replace") if self.folder else ""
        except OSError:
            return ""


def read(places: Sequence[Path], aliases: Mapping[str, str]) -> tuple[list[Run], list[Broken]]:
    """The runs in folders and tables that have figures, oldest first, and those that have not.

    Args:
        aliases: names of models by what configs call them.

    Raises:
        ReportError: there is no record.
    """
    found = sources.find(places)
    broken = [Broken(one.name, "unreadable", one.error) for one in found if one.record is None]
    whole = [(one.name, one.record, one.folder) for one in found if one.record is not None]
    models = _models([record for _, record, _ in whole], aliases)
    runs = [Run(name, model, record, folder) for (name, record, folder), model in zip(whole, models, strict=True)]
    runs.sort(key=lambda run: (run.record.get("started") or "", run.name))
    kept = {run.identity: run for run in runs if run.record["status"] == "success"}
    for run in runs:
        if run.record["status"] != "success":
            broken.append(_broken(run, run.identity in kept))
        elif kept[run.identity] is not run:
            reason = f"same settings as {kept[run.identity].name}, which counts"
            broken.append(Broken(run.name, "repeated", reason, run.experiment))
    return list(kept.values()), broken


def pattern_name(sparsity: float | None, n: int | None = None, m: int | None = None) -> str:
    """What tables call a pattern."""
    if m is not None:
        return f"{n}:{m}"
    return "" if sparsity is None else f"{100 * sparsity:.4g}%"


def last_part(node: Mapping[str, Any]) -> str:
    """The class of a config node: what stands last in its `_target_`."""
    return str(node.get("_target_", "")).rsplit(".", 1)[-1]


def _broken(run: Run, repeated: bool) -> Broken:
    status = {"started": "unfinished"}.get(run.record["status"], run.record["status"])
    default = "still running, or killed" if status == "unfinished" else "no error on record"
    error = run.record.get("error") or default
    error += " (a run with the same settings succeeded)" if repeated else ""
    return Broken(run.name, status, error, run.experiment)


def _models(records: Sequence[Mapping[str, Any]], aliases: Mapping[str, str]) -> list[str]:
    """What tables call the model of every record; of several with one name, the folder that they are in as well."""
    places = [aliases.get(place, place) for place in map(_place, records)]
    with_name: dict[str, set[str]] = {}
    for place in places:
        with_name.setdefault(own_name(place), set()).add(place)
    return [
        name if len(with_name[name := own_name(place)]) == 1 else "/".join(Path(place).parts[-2:]) for place in places
    ]


def _place(record: Mapping[str, Any]) -> str:
    """The choice of a model, or where one's own is."""
    config = record["config"].get("model") or {}
    chosen = (record.get("choices") or {}).get("model")
    if chosen and chosen not in PLACES:
        return str(chosen)
    return str(config.get("path") or config.get("file") or last_part(config) or "model")


def _protocol(found: Mapping[str, Any]) -> Protocol:
    windows, seqlen = found.get("windows", 0), found.get("seqlen", 0)
    stride = found.get("stride") or seqlen
    whole = max(0, (found.get("text_tokens", 0) - seqlen) // stride + 1) if stride else 0
    limited = found.get("max_windows") is not None and windows < whole
    return Protocol(seqlen, stride, bool(found.get("bos")), windows if limited else None, str(found.get("digest", "")))


def _settings(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        full = f"{prefix}{key}"
        if not counts(key, "point") or full in ("pattern", "metric") or key == "follow":  # which the method's name has
            continue
        if prefix == "calibration." and (key in _CALIBRATION_SOURCE or key == "_target_"):
            continue
        if isinstance(value, Mapping):
            if key == "metric":
                yield full, last_part(value)
            else:
                yield from _settings(value, f"{full}.")
        elif key != "_target_" and not isinstance(value, list):
            yield full, value
