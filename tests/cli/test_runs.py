"""Whole runs of the command, on models that take no time: what they leave behind, and that it is true."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from barber import NM, Barber, BlockReport, Wanda, prune
from barber.data.calibration import CalibrationSet
from barber.run import runner
from barber.run.plots import plot_losses
from barber.run.reading import read
from barber.run.record import Zeros
from barber.run.tracking import Wandb
from tests import tiny
from tests.cli.running import (
    TEXT,
    barber,
    blocks_of,
    done,
    files_of,
    layers_of,
    linear_weights,
    loaded,
    record_of,
    save_model,
    write_inputs,
)

LINEARS = [
    f"model.layers.{layer}.{path}"
    for layer in (0, 1)
    for path in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    save_file({"tokens": tiny.tokens(9, 32, seed=3)}, folder / "evaluation.safetensors")
    return folder


def command(inputs: Path, out: Path, rebuild: str = "rebuild=barber rebuild.barber.alpha=0.1") -> list[str]:
    """The command of the contract."""
    return [
        "model=local",
        f"model.path={inputs / 'model'}",
        "calibration=tokens",
        f"calibration.path={inputs / 'tokens.safetensors'}",
        "pattern=2of4",
        "pruner=wanda",
        *rebuild.split(),
        "metric=weight_gradient",
        "evals=none",
        "export=hf",
        f"hydra.run.dir={out}",
    ]


def perplexity(inputs: Path) -> list[str]:
    path = inputs / "evaluation.safetensors"
    return [
        "evals=perplexity",
        "evals/text=tokens",
        f"evals.texts.tokens.path={path}",
        "evals.seqlen=16",
        "evals.max_windows=40",
    ]


def perplexities(folder: Path) -> dict[str, dict[str, Any]]:
    """What a run measured on the one text, by stage."""
    return {stage: results["perplexity"]["tokens"] for stage, results in record_of(folder)["results"].items()}


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "unfinished" in path.name]


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the contract's command."""
    out = tmp_path_factory.mktemp("run")
    done(*command(inputs, out))
    return out


def test_the_folder_of_a_run_holds_what_is_promised_and_nothing_unfinished(run: Path) -> None:
    hydras = {f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")}
    model = {f"model/{name}" for name in ("config.json", "generation_config.json", "model.safetensors", "README.md")}
    assert files_of(run) == {"record.json", "layers.jsonl", "run.log", "loss.png"} | hydras | model
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    log = (run / "run.log").read_text(encoding="utf-8")
    assert "Calibration: 6 samples of 32 tokens" in log
    assert log.count("pairs exchanged") == 4
    assert "Finished in" in log


def test_the_record_tells_the_config_the_code_the_seeds_and_the_calibration_set(inputs: Path, run: Path) -> None:
    record = record_of(run)
    assert (record["status"], record["error"], record["traceback"]) == ("success", None, None)
    assert record["started"] <= record["finished"]
    assert record["overrides"] == command(inputs, run)[:-1]
    config = record["config"]
    assert config["model"]["path"] == str(inputs / "model")
    assert config["pattern"] == {"_target_": "barber.NM", "n": 2, "m": 4}
    assert config["rebuild"]["barber"]["alpha"] == 0.1
    assert config["rebuild"]["barber"]["metric"] == {"_target_": "barber.WeightGradient"}
    assert (config["evals"], config["seed"]) == (None, 0)
    assert "${" not in json.dumps(config)
    assert {"python", "llm-barber", "torch", "transformers", "safetensors"} <= set(record["versions"])
    assert record["seeds"] == {"run": 0, "calibration": None}
    assert record["machine"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    digest = CalibrationSet(tiny.tokens(6, 32), "").digest
    assert record["calibration"] == {
        "source": f"token ids of {inputs / 'tokens.safetensors'}",
        "samples": 6,
        "seqlen": 32,
        "digest": digest,
        "distinct": 6,
    }
    assert set(record["seconds"]) == {"prepare", "load", "walk", "export"}
    assert all(seconds >= 0 for seconds in (*record["seconds"].values(), *record["walk_seconds"].values()))
    assert sum(record["walk_seconds"].values()) <= record["seconds"]["walk"]


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / ".git").exists() or shutil.which("git") is None, reason="not a git checkout"
)
def test_the_record_tells_the_commit_and_whether_files_differ_from_it(run: Path) -> None:
    git = record_of(run)["git"]
    assert re.fullmatch(r"[0-9a-f]{40}", git["commit"])
    assert git["dirty"] in (True, False)


def test_the_recorded_zeros_are_those_of_the_exported_weights(run: Path) -> None:
    record, weights = record_of(run), linear_weights(loaded(run / "model"))
    assert list(record["linears"]) == LINEARS
    assert set(weights) == set(LINEARS)
    for name, weight in weights.items():
        assert record["linears"][name]["zeros"] == int((weight == 0).sum())
        assert record["linears"][name]["weights"] == weight.numel()
        assert ((weight.reshape(-1, 4) == 0).sum(dim=1) == 2).all()
    assert record["sparsity"]["sparsity"] == 0.5
    assert record["sparsity"]["zeros"] * 2 == record["sparsity"]["weights"]
    assert record["sparsity"]["exchanges"] == sum(counts["exchanges"] for counts in record["linears"].values())


def test_layers_jsonl_has_a_line_a_block(run: Path) -> None:
    lines = layers_of(run)
    blocks = [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
    assert [(line["layer"], line["block"]) for line in lines] == blocks
    fields = {"layer", "block", "sparsity", "exchanges", "loss_before", "loss_after", "seconds", "linears", "by_step"}
    for line in lines:
        assert set(line) == fields
        assert line["sparsity"] == 0.5
        assert line["loss_before"] > 0
        assert line["loss_after"] > 0
        assert line["by_step"] == [line["exchanges"]]
    assert sum(line["exchanges"] for line in lines) == record_of(run)["sparsity"]["exchanges"] > 0


def test_the_exported_model_computes_what_the_function_call_gives(inputs: Path, run: Path) -> None:
    model, tokens_NL = loaded(inputs / "model"), tiny.tokens(6, 32)
    batch_size = record_of(run)["machine"]["batch_size"]
    prune(model, tokens_NL, pattern=NM(2, 4), pruner=Wanda(), rebuild=Barber(alpha=0.1), batch_size=batch_size)
    with torch.no_grad():
        assert torch.equal(loaded(run / "model")(tokens_NL).logits, model(tokens_NL).logits)


def test_the_model_card_has_the_config_and_the_sparsity(run: Path) -> None:
    card, record = (run / "model" / "README.md").read_text(encoding="utf-8"), record_of(run)
    assert "pruned to 2:4 sparsity" in card
    assert f"{record['sparsity']['zeros']:,} of the {record['sparsity']['weights']:,} weights" in card
    assert "(50.00%)" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == record["config"]
    assert {"pruned", "sparsity-50", "2of4"} <= set(yaml.safe_load(card.split("---\n")[1])["tags"])
    assert record["calibration"]["digest"] in card


def test_the_code_of_the_model_card_loads_the_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (run / "model" / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run / "model")
    found: dict[str, Any] = {}
    exec(code, found)
    assert torch.equal(found["model"].lm_head.weight, loaded(run / "model").lm_head.weight)


def test_own_models_keep_their_names(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("My Model (v2)", "Other"):
        shutil.copytree(inputs / "model", tmp_path / name)
    given = [each for each in command(inputs, tmp_path) if not each.startswith(("hydra.run.dir", "model.path"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done(*given, "model.path='My Model (v2)'")
        done("-m", *given, "model.path='My Model (v2)',Other")
    (folder,) = Path("outputs/runs").iterdir()
    assert folder.name.endswith("_My-Model-v2_2of4_wanda_barber")
    assert "# My-Model-v2_2of4_wanda_barber\n" in (folder / "model/README.md").read_text(encoding="utf-8")
    names = sorted(path.name[:-13] for path in Path("outputs/sweeps/model_2of4_wanda_barber").glob("*-*"))
    assert names == ["My-Model-v2_2of4_wanda_barber", "Other_2of4_wanda_barber"]


def test_the_exported_files_may_be_read_by_whoever_may_read_the_folder(run: Path) -> None:
    files = [path for path in (run / "model").iterdir() if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(run / "record.json").stat().st_mode}
    assert (run / "model").stat().st_mode == (run / ".hydra").stat().st_mode


def test_the_same_config_gives_the_same_bytes_again(inputs: Path, run: Path, tmp_path: Path) -> None:
    done(*command(inputs, tmp_path))
    again, first = record_of(tmp_path), record_of(run)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
    for key in ("config", "seeds", "calibration", "sparsity", "linears", "results", "files"):
        assert again[key] == first[key]
    assert blocks_of(tmp_path) == blocks_of(run)


def test_exported_masks_are_the_zeros_of_the_models(inputs: Path, run: Path, tmp_path: Path) -> None:
    for out in ("once", "again"):
        done(*command(inputs, tmp_path / out), "export=masks")
    done(*command(inputs, tmp_path / "initial", rebuild="rebuild=none"))
    assert not (tmp_path / "once" / "model").exists()
    assert record_of(tmp_path / "once")["files"]["masks"] == "masks.safetensors"
    packed = load_file(tmp_path / "once" / "masks.safetensors")
    assert set(packed) == {f"{stage}.{name}" for stage in ("initial", "final") for name in LINEARS}
    for stage, out in (("initial", tmp_path / "initial"), ("final", run)):
        for name, weight in linear_weights(loaded(out / "model")).items():
            mask = np.unpackbits(packed[f"{stage}.{name}"].numpy(), count=weight.numel()).reshape(weight.shape)
            assert np.array_equal(mask == 1, (weight == 0).numpy())
    assert any(not torch.equal(packed[f"initial.{name}"], packed[f"final.{name}"]) for name in LINEARS)
    first, second = ((tmp_path / out / "masks.safetensors").read_bytes() for out in ("once", "again"))
    assert first == second


def test_three_stages_are_measured_and_the_pruned_one_is_that_of_a_run_without_rebuilding(
    inputs: Path, tmp_path: Path
) -> None:
    rebuilt, pruned = tmp_path / "rebuilt", tmp_path / "pruned"
    done(*command(inputs, rebuilt), *perplexity(inputs))
    done(*command(inputs, pruned, rebuild="rebuild=none"), *perplexity(inputs))
    results, without = (perplexities(out) for out in (rebuilt, pruned))
    assert list(results) == ["dense", "pruned", "rebuilt"]
    assert list(without) == ["dense", "pruned"]
    assert without["dense"] == results["dense"] | {"cached": without["dense"]["cached"]}
    assert without["pruned"] == results["pruned"] | {"cached": without["pruned"]["cached"]}
    assert len({result["nll_per_token"] for result in results.values()}) == 3
    assert all(result["windows"] == 18 and result["seqlen"] == 16 for result in results.values())
    assert not (pruned / "loss.png").exists()
    assert all(line["loss_before"] is line["loss_after"] is None for line in layers_of(pruned))

    windows_NL = load_file(inputs / "evaluation.safetensors")["tokens"].reshape(18, 16)
    for out, expected in ((rebuilt, results["rebuilt"]), (pruned, results["pruned"])):
        with torch.no_grad():
            loss = loaded(out / "model")(windows_NL, labels=windows_NL).loss.item()
        assert expected["nll_per_token"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("stages", [["pruned"], ["dense", "rebuilt"]], ids=",".join)
def test_only_the_stages_asked_for_are_measured(stages: list[str], inputs: Path, tmp_path: Path) -> None:
    asked = f"evals.stages=[{','.join(stages)}]"
    done(*command(inputs, tmp_path), *perplexity(inputs), asked, "export=none")
    assert list(record_of(tmp_path)["results"]) == stages


def test_without_a_pruner_the_dense_model_is_measured_and_nothing_else_happens(inputs: Path, tmp_path: Path) -> None:
    dense = [*command(inputs, tmp_path, rebuild="rebuild=none"), "pruner=none", "calibration.path=not_looked_at"]
    out = done(*dense, *perplexity(inputs))
    record = record_of(tmp_path)
    assert list(record["results"]) == ["dense"]
    assert (record["sparsity"], record["linears"], record["calibration"]) == (None, {}, None)
    assert not {"layers.jsonl", "loss.png", "model"} & {path.name for path in tmp_path.iterdir()}
    assert f"{perplexities(tmp_path)['dense']['perplexity']:,.2f}" in out


def test_the_end_of_a_run_shows_the_stages_and_where_everything_is(inputs: Path, tmp_path: Path) -> None:
    out = done(*command(inputs, tmp_path), *perplexity(inputs))
    values = [
        f"{found['perplexity']:,.2f} ± {found['perplexity_standard_error']:,.2f}"
        for found in perplexities(tmp_path).values()
    ]
    for row in (
        ["dense", "pruned", "rebuilt"],
        ["zeros", "0.00%", "50.00%", "50.00%"],
        ["perplexity, tokens", *values],
    ):
        assert re.search(" +".join(map(re.escape, row)) + " *$", out, re.MULTILINE)
    for name in ("record.json", "loss.png", "model"):
        assert str(tmp_path / name) in out


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("methods", ["pruner=none rebuild=none", "rebuild=none", "rebuild=barber"])
def test_the_zeros_shown_of_the_dense_model_are_those_that_it_has(
    methods: str, streamed: bool, inputs: Path, tmp_path: Path
) -> None:
    model = tiny.model("llama")
    weights = linear_weights(model)
    for weight in weights.values():
        weight[::3] = 0
    save_model(model, tmp_path / "model")
    total, zeros = (sum(map(count, weights.values())) for count in (torch.numel, lambda weight: (weight == 0).sum()))
    stored = [f"model.path={tmp_path / 'model'}", f"engine.streaming={streamed}", f"hydra.run.dir={tmp_path / 'out'}"]
    out = done(*command(inputs, tmp_path, rebuild=methods), *perplexity(inputs), "export=none", *stored)
    found = read(tmp_path / "out").zeros
    assert found["dense"] == Zeros(int(zeros), total)
    row = [f"{found[stage].share:.2%}" for stage in perplexities(tmp_path / "out")]
    assert re.search(" +".join(["zeros", *row]) + " *$", out, re.MULTILINE)


def test_samples_that_repeat_others_are_told_wherever_samples_are_counted(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text(TEXT[:40], encoding="utf-8")
    text = ["calibration=text", f"calibration.path={tmp_path / 'short'}", "calibration.nsamples=20"]
    out = done("model=tiny", *text, "calibration.seqlen=32", "evals=none", f"hydra.run.dir={tmp_path / 'out'}")
    distinct = record_of(tmp_path / "out")["calibration"]["distinct"]
    assert 1 < distinct < 20
    assert out.count(f"Only {distinct} of the 20 calibration samples are distinct") == 1
    words = f"alibrated on 20 samples of 32 tokens ({distinct} distinct) from "
    assert words in out and words in (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")


KEPT = "rebuild.barber.retain_reconstruction=true"
NOTHING = "exchanged no pair in any block"


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (KEPT, f"{KEPT} (it keeps something right after pruner=sparsegpt)"),
        (f"{KEPT} pruner=sparsegpt", None),
        (
            f"rebuild=[swaps,barber] {KEPT} pruner=sparsegpt",
            f"{KEPT} (it keeps something right after pruner=sparsegpt)",
        ),
        (
            "rebuild=[barber,swaps] rebuild.barber.alpha=0.0001",
            f"rebuild.barber.alpha=0.0001 {NOTHING} (a larger one may, and method=best_mask gains more)",
        ),
        ("rebuild=dsnot rebuild.dsnot.threshold=1000", f"rebuild.dsnot {NOTHING} (method=best_mask gains more)"),
        ("rebuild.barber.alpha=0", None),
        ("rebuild=none update=least_squares", None),
        ("pattern=unstructured pattern.sparsity=0", None),
    ],
)
def test_what_was_asked_for_in_vain_is_said_once(
    methods: str, sentence: str | None, inputs: Path, tmp_path: Path
) -> None:
    out = done(*command(inputs, tmp_path, rebuild="rebuild=barber"), "export=none", *methods.split())
    lines = [line.removeprefix("Without effect: ") for line in out.splitlines() if line.startswith("Without effect")]
    assert lines == ([f"{sentence}."] if sentence else [])


def test_where_nothing_was_lost_nothing_is_drawn(inputs: Path, tmp_path: Path) -> None:
    texts = [*perplexity(inputs), "evals=agreement", "export=none"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done(*command(inputs, tmp_path), *texts, "pattern=unstructured", "pattern.sparsity=0")
        half = [BlockReport(0, name, 0.5, 1, loss, loss, 0.1, {}) for name, loss in (("attention", 0.0), ("mlp", 1.0))]
        plot_losses(half, "a title", tmp_path / "half.png")
    assert record_of(tmp_path)["files"] == {}
    assert {path.name for path in tmp_path.glob("*.png")} == {"half.png"}


@pytest.mark.parametrize(
    "overrides",
    [
        "pruner=sparsegpt pattern=2of4",
        "pruner=magnitude rebuild.barber.granularity=block",
        "pruner=wanda metric=weight",
        "pruner=gblm rebuild=none",
        "pruner=wanda_plus rebuild=none",
        "pruner=random",
    ],
)
def test_a_random_model_and_ones_own_text_are_enough_to_try_things_out(overrides: str, tmp_path: Path) -> None:
    (tmp_path / "text.md").write_text(TEXT, encoding="utf-8")
    text = f"calibration=text calibration.path={tmp_path} calibration.nsamples=8 calibration.seqlen=64"
    done("model=tiny", *text.split(), "evals=none", *overrides.split(), f"hydra.run.dir={tmp_path / 'out'}")
    record = record_of(tmp_path / "out")
    assert record["sparsity"]["sparsity"] == pytest.approx(0.5, abs=0.001)
    assert record["seeds"] == {"run": 0, "calibration": 0}
    assert (record["calibration"]["samples"], record["calibration"]["seqlen"]) == (8, 64)
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()


def test_steps_an_update_and_an_allocation_go_together(tmp_path: Path) -> None:
    (tmp_path / "text.md").write_text(TEXT, encoding="utf-8")
    text = f"calibration=text calibration.path={tmp_path} calibration.nsamples=8 calibration.seqlen=64"
    methods = "pruner=wanda rebuild=[swaps,barber] rebuild.swaps.follow=0.5 update=least_squares allocation=owl"
    done("model=tiny", *text.split(), "evals=none", *methods.split(), f"hydra.run.dir={tmp_path / 'out'}")
    record, weights = record_of(tmp_path / "out"), linear_weights(loaded(tmp_path / "out" / "model"))
    assert list(record["config"]["rebuild"]) == ["swaps", "barber"]
    total, zeros = (record["sparsity"][key] for key in ("weights", "zeros"))
    assert abs(zeros - total / 2) <= 1
    assert {name: counts["zeros"] for name, counts in record["linears"].items()} == {
        name: int((weight == 0).sum()) for name, weight in weights.items()
    }
    assert sum(weight.numel() for weight in weights.values()) == total
    assert len({round(line["sparsity"], 3) for line in layers_of(tmp_path / "out")}) > 1
    assert record["sparsity"]["exchanges"] > 0


@pytest.mark.parametrize("several", [False, True])
def test_what_another_library_says_is_one_line_and_its_traceback_is_in_the_log(
    several: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Error(s) in loading LlamaDecoderLayer:\n\tsize mismatch")

    monkeypatch.setattr(runner, "prepare", fail)
    sentence = "RuntimeError: Error(s) in loading LlamaDecoderLayer:"
    result = barber(*(["-m", f"hydra.sweep.dir={tmp_path}"] if several else []), *command(inputs, tmp_path))
    assert (result.code, result.err) == (1, f"barber: {sentence} (run.log has the traceback)\n")
    (record,) = tmp_path.rglob("record.json")
    assert record_of(record.parent)["error"] == sentence
    assert "\tsize mismatch" in record_of(record.parent)["traceback"]
    assert "Traceback" in (record.parent / "run.log").read_text(encoding="utf-8")


@pytest.fixture
def broken(inputs: Path, tmp_path: Path) -> Path:
    """A folder with a model that has one NaN."""
    model = loaded(inputs / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    save_model(model, tmp_path / "broken")
    return tmp_path / "broken"


def test_a_run_that_fails_says_where_in_one_sentence_and_leaves_no_model(
    broken: Path, inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sentence = "model.layers.1.mlp.up_proj: the weight is NaN or infinite"
    result = barber(*command(inputs, out), f"model.path={broken}")
    assert (result.code, result.err) == (1, f"barber: {sentence}\n")
    assert "Traceback" not in result.out
    record = record_of(out)
    assert (record["status"], record["error"]) == ("failed", sentence)
    assert "NumericsError" in record["traceback"]
    assert "Traceback" in (out / "run.log").read_text(encoding="utf-8")
    assert [line["layer"] for line in layers_of(out)] == [0, 0]
    assert not (out / "model").exists()
    assert not unfinished(out)


def test_the_folder_of_a_failed_run_can_be_used_again(broken: Path, inputs: Path, run: Path, tmp_path: Path) -> None:
    """Layer 0 came out well and was kept; with the model mended, the same command goes on from there."""
    out = tmp_path / "out"
    assert barber(*command(inputs, out), f"model.path={broken}").code == 1
    shutil.rmtree(broken)
    save_model(loaded(inputs / "model"), broken)
    done(*command(inputs, out), f"model.path={broken}")
    assert record_of(out)["status"] == "success"
    assert record_of(out)["resumed"] == {"from": str(out), "layers": 1}
    assert record_of(out)["linears"] == record_of(run)["linears"]
    assert len(layers_of(out)) == 4
    assert not (out / "checkpoint").exists()
    assert (out / "model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()


def test_the_folder_of_a_run_that_finished_no_layer_is_free_for_any_other(
    broken: Path, inputs: Path, run: Path, tmp_path: Path
) -> None:
    model = loaded(broken)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    save_model(model, broken)
    out = tmp_path / "out"
    assert barber(*command(inputs, out), f"model.path={broken}").code == 1
    assert not (out / "checkpoint").exists()
    done(*command(inputs, out))
    assert (record_of(out)["status"], record_of(out)["resumed"]) == ("success", None)
    assert record_of(out)["linears"] == record_of(run)["linears"]
    assert len(layers_of(out)) == 4


def test_an_interrupted_run_ends_with_a_word_and_a_record(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("barber.walk.pruning.Pruning.carry_out", interrupt)
    result = barber(*command(inputs, tmp_path))
    assert (result.code, result.err) == (130, "barber: interrupted; the same command begins anew\n")
    assert record_of(tmp_path)["status"] == "failed"
    assert "KeyboardInterrupt" in record_of(tmp_path)["traceback"]


@pytest.mark.parametrize("export", ["hf", "masks"])
def test_an_export_that_breaks_off_leaves_nothing_half_written(
    export: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*arguments: Any, **_: Any) -> None:
        target = Path(arguments[1])
        (target / "model.safetensors" if target.is_dir() else target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", break_off)
    monkeypatch.setattr("barber.run.export.save_file", break_off)
    result = barber(*command(inputs, tmp_path), f"export={export}")
    assert result.code == 1
    path = tmp_path / {"hf": "model", "masks": "masks.safetensors"}[export]
    sentence = f"{path} cannot be written: No space left on device"
    assert result.err == f"barber: {sentence}\n"
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["error"]) == ("failed", sentence)
    assert not {"model", "masks.safetensors"} & {path.name for path in tmp_path.iterdir()}
    assert not unfinished(tmp_path)


def test_a_model_that_a_killed_run_left_is_not_replaced(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    result = barber(*command(inputs, tmp_path / "out"))
    assert result.code == 2
    assert "hydra.run.dir must not hold an exported model" in result.err


def test_without_a_folder_a_run_gets_one_that_tells_time_and_choices(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    done(*[argument for argument in command(inputs, tmp_path) if not argument.startswith("hydra.run.dir")])
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_model_2of4_wanda_barber", folder.name)
    assert not [str(warning.message) for warning in recwarn if "KeepFinishedRuns" in str(warning.message)]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_a_run_can_be_followed_offline_with_wandb(inputs: Path, tmp_path: Path) -> None:
    done(*command(inputs, tmp_path), "tracker=wandb", "tracker.mode=offline", "export=none")
    assert record_of(tmp_path)["status"] == "success"
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.parametrize("step", ["start", "block", "finish"])
def test_a_tracker_that_breaks_down_does_not_cost_the_run(
    step: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: Any) -> None:
        raise ConnectionError("the service is down")

    for other in ("start", "block", "finish"):
        monkeypatch.setattr(Wandb, other, break_down if other == step else lambda *_: "run")
    out = done(*command(inputs, tmp_path), "tracker=wandb", "export=none")
    assert record_of(tmp_path)["status"] == "success"
    assert len(layers_of(tmp_path)) == 4
    assert out.count("the service is down") == 1


def test_a_real_process_says_nothing_on_stderr_but_what_went_wrong(inputs: Path, tmp_path: Path) -> None:
    """`test_wheel` has one that goes well."""
    arguments = [sys.executable, "-m", "barber", *command(inputs, tmp_path), "calibration.nsamples=7"]
    bad = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert (bad.returncode, bad.stderr) == (
        2,
        f"barber: calibration.nsamples must be at most 6, the samples of {inputs / 'tokens.safetensors'}\n",
    )
