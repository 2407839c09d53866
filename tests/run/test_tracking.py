"""What W&B is told, read back with W&B's own tools; and what happens where W&B cannot be told."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from barber import BlockReport
from barber.evals.results import StageResults
from barber.run.reading import read
from barber.run.record import RunRecord
from barber.run.tracking import Tracking, Wandb, figures, point
from tests import records
from tests.cli.running import barber, record_of, write_inputs

wandb = pytest.importorskip("wandb")

SWEEPS = Path(__file__).parents[2] / "conf" / "wandb"
BLOCK = BlockReport(0, "mlp", 0.5, 3, 2.0, 1.0, 0.1, {})


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def record(**values: Any) -> RunRecord:
    choices = {"model": "tiny", "pattern": "2of4", "pruner": "wanda", "rebuild": "barber", "experiment": None}
    made = RunRecord.begin({"seed": 1}, [], choices)
    for key, value in values.items():
        setattr(made, key, value)
    return made


def read_back(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of W&B's file by type, as W&B's own command reads them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    found: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, lines):
        found.setdefault(line["type"], []).append(line.get(line["type"], {}))
    return found


def offline_folder(run: Path) -> Path:
    [folder] = (run / "wandb").glob("offline-run-*")
    return folder


def summary_of(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {key: value for entry in found["summary"] for key, value in entry.get("update", {}).items()}


def rows_of(found: dict[str, list[dict[str, Any]]], table: str, folder: Path) -> list[list[Any]]:
    [path] = [entry["item"][f"{table}.path"] for entry in found["history"] if f"{table}.path" in entry["item"]]
    rows: list[list[Any]] = json.loads((folder / "files" / path).read_text(encoding="utf-8"))["data"]
    return rows


def test_an_offline_run_holds_config_series_results_tables_and_plots(inputs: Path, tmp_path: Path) -> None:
    result = barber(
        "model=local",
        f"model.path={inputs / 'model'}",
        "calibration=tokens",
        f"calibration.path={inputs / 'tokens.safetensors'}",
        "evals/text=tokens",
        f"evals.texts.tokens.path={inputs / 'tokens.safetensors'}",
        "evals.seqlen=16",
        "evals=[perplexity,agreement]",
        "pruner=wanda",
        "rebuild.barber.alpha=0.3",
        "export=none",
        "tracker=wandb",
        "tracker.mode=offline",
        f"hydra.run.dir={tmp_path}",
    )
    assert (result.code, result.err) == (0, "")
    kept, folder = record_of(tmp_path), offline_folder(tmp_path)
    assert kept["tracking"] == {"folder": str(folder), "sync": f"wandb sync {folder}"}
    assert f"wandb sync {folder}" in (tmp_path / "run.log").read_text(encoding="utf-8")

    found = read_back(folder)
    run = found["run"][0]
    assert run["display_name"].startswith("model_unstructured_wanda_barber ")
    assert run["display_name"].endswith(" rebuild.barber.alpha=0.3")
    config = run["config"]["update"]
    assert {key: config[key] for key in kept["config"] if kept["config"][key] is not None} == {
        key: value for key, value in kept["config"].items() if value is not None
    }
    assert found["stats"]  # W&B's own, of the system

    layers = [json.loads(line) for line in (tmp_path / "layers.jsonl").read_text(encoding="utf-8").splitlines()]
    series = [entry["item"] for entry in found["history"] if "block" in entry["item"]]
    assert [item["block"] for item in series] == [1, 2, 3, 4]
    for item, line in zip(series, layers, strict=True):
        for key in ("loss_before", "loss_after", "exchanges", "seconds", "sparsity"):
            assert item[f"{line['block']}/{key}"] == pytest.approx(line[key], rel=1e-9)

    summary = summary_of(found)
    rows = list(figures(read(tmp_path).results))
    measures = {row[1] for row in rows}
    assert measures == {"perplexity", "nll_per_token", "kl_divergence", "top1_agreement"}
    for stage, measure, text, value, _ in rows:
        assert summary[f"{stage}/{measure}/{text}"] == pytest.approx(value, rel=1e-9)
    assert summary["status"] == "success"
    assert summary["zeros"] == kept["sparsity"]["zeros"]
    assert summary["seconds/walk"] == pytest.approx(kept["seconds"]["walk"], rel=1e-9)
    assert [tuple(row) for row in rows_of(found, "results", folder)] == rows
    assert {row[0]: row[1:] for row in rows_of(found, "linears", folder)} == {
        name: [counts["weights"], counts["zeros"], counts["exchanges"]] for name, counts in kept["linears"].items()
    }
    pictures = list((folder / "files" / "media" / "images" / "plots").glob("*.png"))
    assert {"_".join(picture.stem.split("_")[:-2]) for picture in pictures} == {"loss", "block_errors"}
    assert found["exit"][0].get("exit_code", 0) == 0


def test_a_failed_run_ends_with_an_exit_code_and_its_error(tmp_path: Path) -> None:
    tracking, kept = Tracking(Wandb(mode="offline")), record()
    kept.choices["experiment"] = "paper_wanda"
    tracking.start("name", kept, tmp_path)
    tracking.block(1, BLOCK)
    kept.status, kept.error = "failed", "KeyboardInterrupt: "
    tracking.finish(kept)
    found = read_back(offline_folder(tmp_path))
    run = found["run"][0]
    assert (run["run_group"], run["job_type"], run["display_name"]) == ("paper_wanda", "wanda_barber", "name")
    assert run["tags"] == ["tiny", "2of4", "wanda", "barber"]
    assert run["config"]["update"]["choices"] == kept.choices
    assert found["exit"][0]["exit_code"] == 1
    assert summary_of(found)["error"] == "KeyboardInterrupt: "
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["tracking"]["folder"]


def test_disabled_does_nothing_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", None)
    tracking, kept = Tracking(Wandb(mode="disabled")), record()
    tracking.start("name", kept, tmp_path)
    tracking.block(1, BLOCK)
    tracking.finish(kept)
    assert kept.tracking == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_users_wandb_mode_wins_over_the_default(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert f"mode: {mode}" in barber("tracker=wandb", "--cfg", "job", "--resolve").out


def goes_on_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Track a run that is to be online; it has to end offline, and soon."""
    caplog.set_level(logging.INFO, logger="barber")
    begun = time.monotonic()
    tracking, kept = Tracking(Wandb()), record()
    tracking.start("name", kept, tmp_path)
    tracking.block(1, BLOCK)
    kept.status = "success"
    tracking.finish(kept)
    assert time.monotonic() - begun < 60
    folder = offline_folder(tmp_path)
    assert kept.tracking == {"folder": str(folder), "sync": f"wandb sync {folder}"}
    warnings = [entry for entry in caplog.records if entry.levelname == "WARNING"]
    assert f"wandb sync {folder}" in warnings[-1].getMessage()
    assert [entry["item"]["block"] for entry in read_back(folder)["history"] if "block" in entry["item"]] == [1]
    return warnings[0].getMessage()


def test_without_a_key_nobody_is_asked_and_the_run_is_tracked_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: prompt)
    assert "no API key" in goes_on_offline(tmp_path, caplog)


def test_without_a_network_the_run_is_tracked_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError("nobody is there")

    monkeypatch.setattr("barber.run.tracking.getproxies", dict)
    monkeypatch.setattr("barber.run.tracking.socket.create_connection", refuse)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: True)
    assert "nobody is there" in goes_on_offline(tmp_path, caplog)


def test_a_service_that_refuses_the_run_leaves_it_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = wandb.init

    def only_offline(**arguments: Any) -> Any:
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("permission denied\nand more")
        return init(**arguments)

    monkeypatch.setattr("barber.run.tracking._require_answer", lambda url: None)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: True)
    monkeypatch.setattr(wandb, "init", only_offline)
    assert goes_on_offline(tmp_path, caplog) == "W&B cannot be reached: permission denied."


class Breaking:
    """A tracker's run that fails at one of its methods, and counts."""

    def __init__(self, folder: Path, at: str) -> None:
        self.settings = type("Settings", (), {"sync_dir": str(folder)})
        self.offline, self.at, self.summary = True, at, {}
        self.calls: list[str] = []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at:
            raise ConnectionError("it broke")

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, *_: Any) -> None:
        self._called("log")

    def finish(self, exit_code: int) -> None:
        self._called("finish")


@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_whatever_breaks_costs_one_warning_and_not_the_run(
    at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Breaking(tmp_path / "kept", at)

    def init(**_: Any) -> Breaking:
        if at == "init":
            raise OSError("it broke")
        return run

    monkeypatch.setattr(wandb, "init", init)
    tracking, kept = (
        Tracking(Wandb(mode="offline")),
        record(results={"dense": StageResults({"a": records.perplexity(2.0)})}),
    )
    monkeypatch.setattr(wandb, "Table", lambda **_: None)
    tracking.start("name", kept, tmp_path)
    tracking.block(1, BLOCK)
    tracking.block(2, BLOCK)
    tracking.finish(kept)
    [warning] = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert "it broke" in warning
    assert (f"wandb sync {tmp_path / 'kept'}" in warning) == (at != "init")
    assert run.calls == {"init": [], "log": ["log", "log", "finish"], "finish": ["log", "log", "log", "finish"]}[at]


def test_a_name_tells_the_point_and_nothing_twice() -> None:
    overrides = [
        "pruner=wanda",
        "model=hub",
        "rebuild.barber.alpha=0.1",
        "calibration.path=/a/long/way/to/texts",
        "evals=[perplexity]",
        "hydra.run.dir=x",
        "tracker=wandb",
        "+evals/text@evals.texts.heldout=wikitext2",
        "seed=1",
    ]
    name = point("tiny_2of4_wanda_barber", record(overrides=overrides))
    assert name == "tiny_2of4_wanda_barber rebuild.barber.alpha=0.1 calibration.path=texts seed=1"
    many = [f"rebuild.barber.alpha_{number}=0.1" for number in range(20)] + ["seed=1"]
    long = point("name", record(overrides=many))
    assert len(long) <= 128 and long.startswith("name rebuild") and long.endswith(" seed=1")
    assert len(point("n" * 200, record())) == 128


def test_accuracies_are_figures_too() -> None:
    rows = list(figures({"rebuilt": StageResults(zero_shot=records.ZERO_SHOT)}))
    assert rows == [
        ("rebuilt", "acc", "boolq", 0.5, 0.1),
        ("rebuilt", "em", "wsc", 1, 0),
        ("rebuilt", "acc", "mean", 0.5, None),
    ]


def sampled(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Points at the corners of a sweep, as the service hands them out."""

    def ends(spec: dict[str, Any]) -> list[Any]:
        return [spec["values"][0], spec["values"][-1]] if "values" in spec else [spec["min"], spec["max"], 3.2e-05]

    corners = [ends(spec) for spec in sweep["parameters"].values()]
    return [dict(zip(sweep["parameters"], values, strict=True)) for values in zip(*corners, strict=False)]


def commanded(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The command that W&B's agent makes of a sweep and a point."""
    from wandb.sdk.launch.sweeps import utils

    arguments = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    command: list[str] = []
    for word in utils.create_sweep_command(list(sweep["command"])):
        whole = word.startswith("${") and word.endswith("}")
        command += {**arguments, "env": ["/usr/bin/env"]}[word[2:-1]] if whole else [word]
    return command


@pytest.mark.parametrize("name", ["alpha_granularity", "sparsity"])
def test_the_commands_of_a_sweep_are_commands_of_barber(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "r")
    sweep = yaml.safe_load((SWEEPS / f"{name}.yml").read_text(encoding="utf-8"))
    for values in sampled(sweep):
        program, *overrides = commanded(sweep, values)[1:]
        assert program == sweep["program"] == "barber"
        parsed = {override.key_or_group: override for override in OverridesParser.create().parse_overrides(overrides)}
        assert {key: parsed[key].value() for key in values} == values
        result = barber(*overrides, "--cfg", "job", "--resolve")
        assert result.code == 0, result
        config = yaml.safe_load(result.out)
        assert f"rebuilt/nll_per_token/{next(iter(config['evals']['texts']))}" == sweep["metric"]["name"]
        assert config["calibration"]["split"] == "train"
    assert name == "sparsity" or config["evals"]["texts"]["heldout"]["split"] == "validation"


def test_sweeps_are_no_choices_of_barber() -> None:
    assert "\nwandb:" not in barber("--help").out


def test_an_agent_runs_a_sweeps_command_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.wandb_agent import Agent

    text = tmp_path / "data" / "wikitext-2-raw-v1"
    text.mkdir(parents=True)
    for split in ("train", "valid"):
        (text / f"wiki.{split}.raw").write_text(f" = {split} = \n \n some words of it \n" * 200, encoding="utf-8")
    sweep = yaml.safe_load((SWEEPS / "alpha_granularity.yml").read_text(encoding="utf-8"))
    words = [word for word in sweep["command"] if word not in ("barber", "${args_no_hyphens}")]
    small = ["model=tiny", "device=cpu", f"data_dir={tmp_path / 'data'}", "calibration.seqlen=32", "evals.seqlen=32"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for name, value in {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "swept", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them
        monkeypatch.setenv(name, "")
    agent = Agent(api=None, queue=None)
    agent._sweep_command = [words[0], sys.executable, "-m", "barber", *words[1:], *small, "${args_no_hyphens}"]
    point_ = {"rebuild.barber.alpha": {"value": 0.25}, "rebuild.barber.granularity": {"value": "layer"}}
    agent._command_run({"type": "run", "run_id": "first", "program": "barber", "args": point_})
    process = agent._run_processes["first"]
    process.wait(timeout=120)
    run = tmp_path / "outputs" / "wandb" / "swept" / "first"
    assert process.poll() == 0
    found, kept = read_back(offline_folder(run)), record_of(run)
    assert (found["run"][0]["sweep_id"], found["run"][0]["run_id"]) == ("swept", "first")
    config = found["run"][0]["config"]["update"]
    assert config["rebuild.barber.alpha"] == config["rebuild"]["barber"]["alpha"] == 0.25
    assert config["rebuild"]["barber"]["granularity"] == "layer"
    loss = kept["results"]["rebuilt"]["perplexity"]["heldout"]["nll_per_token"]
    assert summary_of(found)[sweep["metric"]["name"]] == pytest.approx(loss, rel=1e-9)
