"""Which method when: the table is that of the records and of the methods, and the pages have it as it is."""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_module

from barber import SparseGPT
from barber.commands import ls
from barber.config import experiment
from barber.report import records
from barber.run.experiment import Experiment
from tests.cli.running import done
from tests.cli.test_experiments import config_of

ROOT = Path(__file__).parents[2]
TABLE = yaml.safe_load(files("barber.commands").joinpath("methods.yaml").read_text(encoding="utf-8"))
METHODS: dict[str, dict[str, Any]] = TABLE["methods"]


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("barber.conf", version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], list[records.Run]]:
    """The runs of the table's source by pattern and method, one a seed."""
    found: dict[tuple[str, str], list[records.Run]] = {}
    for run in records.read([ROOT / TABLE["source"]], {})[0]:
        pattern, _, name = run.name.partition("/")
        found.setdefault((pattern, name.partition("_seed")[0]), []).append(run)
    return found


def perplexity(runs: list[records.Run]) -> str | None:
    values = [run.perplexity(run.stage, "wikitext2").value for run in runs]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else None
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def test_all_methods_are_in_the_table() -> None:
    assert set(METHODS) == {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}


@pytest.mark.parametrize("name", METHODS)
def test_its_figures_are_those_of_the_records(name: str, runs: dict[tuple[str, str], list[records.Run]]) -> None:
    own = {pattern: found for (pattern, method), found in runs.items() if method == name}
    assert METHODS[name]["perplexity"] == [perplexity(own.get(pattern, [])) for pattern in ("50", "2of4")]
    walks = [run.walk_seconds for run in own.get("50", []) if run.walk_seconds]
    seconds = statistics.fmean(walks) if walks else None
    assert METHODS[name]["seconds"] == (seconds and round(seconds, 1 if seconds < 10 else None))
    memory = max((run.peak_memory or 0 for found in own.values() for run in found), default=0)
    assert METHODS[name]["memory"] == (round(memory / 2**30, 2) if memory else None)


def needs(found: Experiment) -> str:
    """What a method is given, by its pruner and its steps."""
    steps = [step.needs for step in found.steps.values()]
    if getattr(found.pruner, "gradient", None) or any(step.gradient or step.trial for step in steps):
        return "inputs and gradients"
    return "inputs" if getattr(found.pruner, "statistic", None) or any(step.statistic for step in steps) else "nothing"


@pytest.mark.parametrize("name", METHODS)
def test_what_it_says_of_a_method_is_so(name: str) -> None:
    found = experiment(config_of(f"method={name}")[0])
    assert METHODS[name]["needs"] == needs(found)
    is_new = bool(found.update) or (isinstance(found.pruner, SparseGPT) and not found.rebuild)
    assert METHODS[name]["weights"] == ("new" if is_new else "kept")
    assert METHODS[name]["patterns"] == "any"
    for pattern in ("2of4", "nofm pattern.n=3 pattern.m=7"):
        experiment(config_of(f"method={name}", *f"pattern={pattern}".split())[0])


@pytest.mark.parametrize("page", ["docs/methods.md", "README.md"])
def test_the_pages_have_the_table_as_it_is(page: str) -> None:
    path = ROOT / page
    assert run_path(str(ROOT / "docs" / "methods.py"))["filled"](path) == path.read_text(encoding="utf-8"), (
        "run python docs/methods.py"
    )


def test_ls_prints_it_without_torch() -> None:
    said = done("ls", "methods")
    for row in ls.figures():
        for value in row.values():
            assert value in " ".join(said.split()) or value in said, (row["method"], value)
    assert "No GPU figure yet" in said
    code = "import sys; from barber.commands import ls; ls.main(['methods']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
