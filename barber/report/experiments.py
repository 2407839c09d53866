"""A page an experiment: what is asked, what was found, the table, the pictures, the protocol."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from barber.report.answer import answer
from barber.report.page import Front
from barber.report.points import Point
from barber.report.records import Broken, Run


@dataclass(frozen=True)
class Experiment:
    """The runs of an experiment, with figures and without."""

    name: str
    runs: Sequence[Run]
    broken: Sequence[Broken]

    @property
    def stem(self) -> str:
        """Of the page's file; `index` is that of all runs."""
        stem = re.sub(r"[^\w.-]+", "_", self.name)
        return f"{stem}_experiment" if stem == "index" else stem

    def front(self, points: Sequence[Point]) -> Front:
        """Question, answer and protocol."""
        said = {"question": question(self.name), "answer": answer(points)}
        links = {"All runs": ("index.html", "")}
        return Front(
            f"Experiment {self.name}", {key: text for key, text in said.items() if text}, links, protocol(self.runs)
        )


def experiments(runs: Sequence[Run], broken: Sequence[Broken]) -> list[Experiment]:
    """Those that the runs belong to, as they come."""
    chosen = [*(run.experiment for run in runs), *(one.experiment for one in broken)]
    names = dict.fromkeys(name for name in chosen if name)
    return [
        Experiment(
            name,
            [run for run in runs if run.experiment == name],
            [one for one in broken if one.experiment == name],
        )
        for name in names
    ]


def question(experiment: str) -> str:
    """The comment at the top of the experiment's own config; empty for one that is not in the package."""
    try:
        text = resources.files("barber.conf").joinpath("experiment", f"{experiment}.yaml").read_text(encoding="utf-8")
    except (OSError, ImportError):
        return ""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in comment if "@package" not in line)


def protocol(runs: Sequence[Run]) -> dict[str, str]:
    """What the runs were made with and on, each once."""
    texts = dict.fromkeys(
        f"{text}: {protocol}" for run in runs for text, protocol in sorted(run.protocols(run.stage).items())
    )
    found = {
        "model": _each(runs, lambda run: run.model),
        "texts": "; ".join(texts),
        "zero-shot": _each(runs, _zero_shot),
        "calibration": _each(runs, lambda run: run.calibration),
        "seeds": _each(runs, lambda run: run.seed),
        "machine": _each(runs, lambda run: run.machine),
        "commit": _each(runs, lambda run: run.commit),
        "versions": _each(runs, _versions),
    }
    return {key: text for key, text in found.items() if text}


def _each(runs: Iterable[Run], of_run: Callable[[Run], str | None]) -> str:
    return "; ".join(dict.fromkeys(text for run in runs if (text := of_run(run))))


def _zero_shot(run: Run) -> str:
    found = run.at(run.stage).get("zero_shot") or {}
    limit = f", the first {found['limit']} documents of each" if found.get("limit") else ""
    return ", ".join(found.get("mean_of") or found.get("tasks") or []) + limit


def _versions(run: Run) -> str:
    versions = run.record.get("versions") or {}
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
