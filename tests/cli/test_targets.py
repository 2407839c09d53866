"""What a config file names is called only if it is ours, Hydra's, or allowed on the command line."""

import sys
from pathlib import Path

import pytest

from tests.cli.running import barber, complaint, record_of

TINY = "model=tiny calibration=text calibration.path=text.md calibration.nsamples=4 calibration.seqlen=64 evals=none"

#: A package whose every name leaves a mark when it is called, and whose import leaves one, too.
PACKAGE = """
from dataclasses import dataclass
from pathlib import Path

from barber import Wanda

Path("imported").touch()


def made(**_):
    Path("called").touch()


@dataclass(frozen=True)
class Mine(Wanda):
    def __post_init__(self):
        Path("called").touch()
"""


@pytest.fixture(autouse=True)
def _somebody_elses_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "stranger.py").write_text(PACKAGE, encoding="utf-8")
    (tmp_path / "text.md").write_text("A sentence of some words. " * 200, encoding="utf-8")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "package")
    monkeypatch.delitem(sys.modules, "stranger", raising=False)


def theirs(content: str, *more: str) -> tuple[str, ...]:
    """The command that runs an experiment file."""
    Path("conf/experiment/theirs.yaml").write_text(f"# @package _global_\n{content}\n", encoding="utf-8")
    return "--config-dir", "conf", *TINY.split(), "experiment=theirs", "hydra.run.dir=out", *more


def no_mark() -> bool:
    return not Path("imported").exists() and not Path("called").exists()


HYDRAS = {
    "hydra.callbacks.again._target_": "hydra: {callbacks: {again: {_target_: stranger.made}}}",
    "hydra.callbacks.again.inner._target_": "hydra: {callbacks: {again: {inner: {_target_: stranger.made}}}}",
    "hydra.hydra_logging.handlers.console.()": "hydra: {hydra_logging: {handlers: {console: {(): stranger.made}}}}",
    "hydra.job_logging.handlers.console.class": "hydra: {job_logging: {handlers: {console: {class: stranger.made}}}}",
    "hydra.job_logging.handlers.file.filename": (
        "hydra: {job_logging: {handlers: {file: {filename: 'ext://stranger.made'}}}}"
    ),
    "hydra.launcher._target_": "hydra: {launcher: {_target_: stranger.made}}",
    "hydra.sweeper.custom_search_space": (
        "defaults: [override /hydra/sweeper: optuna]\nhydra: {sweeper: {custom_search_space: stranger.made}}"
    ),
    "hydra.sweeper.sampler._target_": (
        "defaults: [override /hydra/sweeper: optuna]\nhydra: {sweeper: {sampler: {_target_: stranger.made}}}"
    ),
}


@pytest.mark.parametrize(("key", "content"), HYDRAS.items(), ids=HYDRAS)
@pytest.mark.parametrize("mode", [(), ("--multirun",)], ids=["run", "sweep"])
def test_what_hydra_would_call_is_refused_before_it_is_imported(key: str, content: str, mode: tuple[str, ...]) -> None:
    sentence = complaint(barber(*theirs(content, *mode)))
    assert sentence.startswith(f"{key} must be of Hydra") and "stranger.made" in sentence
    assert no_mark() and not Path("out").exists()


def test_a_name_that_an_interpolation_makes_is_refused_too() -> None:
    content = "name: stranger.made\nhydra: {callbacks: {again: {_target_: '${name}'}}}"
    assert complaint(barber(*theirs(content))).startswith("hydra.callbacks.again._target_ must be of Hydra")
    assert no_mark()


def test_a_component_of_another_package_is_refused_before_it_is_imported() -> None:
    assert complaint(barber(*theirs("pruner: {_target_: stranger.Mine}"))) == (
        "pruner._target_ must be a public name of barber, stranger.Mine is none; if you trust stranger, say "
        "'allow_targets=[stranger.*]' on the command line"
    )
    assert no_mark()


@pytest.mark.parametrize("pattern", ["stranger.*", "stranger.Mine"])
def test_a_component_that_the_command_line_allows_prunes(pattern: str) -> None:
    result = barber(*theirs("pruner: {_target_: stranger.Mine}", f"allow_targets=[{pattern}]"))
    assert (result.code, result.err) == (0, ""), result
    assert Path("called").exists()
    record = record_of(Path("out"))
    assert record["status"] == "success"
    assert record["config"]["allow_targets"] == [pattern]


@pytest.mark.parametrize("pattern", ["strange.*", "stranger.Min", "stranger.made"])
def test_an_allowance_holds_for_what_it_names(pattern: str) -> None:
    sentence = complaint(barber(*theirs("pruner: {_target_: stranger.Mine}", f"allow_targets=[{pattern}]")))
    assert sentence.startswith("pruner._target_ must be a public name of barber")
    assert no_mark()


@pytest.mark.parametrize(
    "content",
    ["allow_targets: [stranger.*]", "hydra: {sweeper: {params: {allow_targets: '[stranger.*]'}}}"],
    ids=["config", "sweep"],
)
def test_a_config_file_allows_nothing(content: str) -> None:
    sentence = complaint(barber(*theirs(f"{content}\npruner: {{_target_: stranger.Mine}}")))
    assert "allow_targets must not stand in a config file" in sentence
    assert no_mark()


@pytest.mark.parametrize("value", ["[*]", "stranger", "[stranger*]", "[[stranger]]"])
def test_an_allowance_is_a_list_of_names(value: str) -> None:
    sentence = complaint(barber(*TINY.split(), f"allow_targets={value}", "hydra.run.dir=out"))
    assert sentence.startswith("allow_targets must be a list of names")
    assert not Path("out").exists()
