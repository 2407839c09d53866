"""`engine.streaming=true`: a run that reads its model layer by layer leaves what one in memory leaves."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests import tiny
from tests.cli.running import (
    barber,
    blocks_of,
    complaint,
    contents,
    done,
    files_of,
    loaded,
    record_of,
    save_model,
    tensors_of,
)

BYTES = 256


@dataclass(frozen=True)
class Case:
    """A model, how it lies on disk, and what is done with it."""

    family: str
    options: str
    dtype: torch.dtype = torch.float32
    shard: str = "5GB"
    base_alone: bool = False


CASES = {
    "llama": Case("llama", "pruner=wanda rebuild.barber.alpha=0.9 export=hf"),
    "gemma2 in bfloat16, tied, in many files, 2:4": Case(
        "gemma2", "pruner=wanda pattern=2of4 rebuild.barber.alpha=0.9 export=hf", torch.bfloat16, shard="10KB"
    ),
    "gpt2 without its prefix, SparseGPT's reconstruction retained": Case(
        "gpt2",
        "pruner=sparsegpt rebuild.barber.alpha=0.9 rebuild.barber.retain_reconstruction=true export=hf",
        base_alone=True,
    ),
    "opt in bfloat16, masks": Case("opt", "pruner=wanda rebuild.barber.alpha=0.9 export=masks", torch.bfloat16),
    "qwen2, magnitude, nothing exported": Case("qwen2", "pruner=magnitude rebuild.barber.alpha=0.9 export=none"),
    "llama, merely pruned": Case("llama", "pruner=wanda rebuild=none export=hf"),
}


def make(folder: Path, case: Case) -> None:
    """What a run needs: a model with a tokenizer of bytes, and token ids."""
    model = tiny.model(case.family, vocab_size=BYTES, bos_token_id=1, eos_token_id=2).to(case.dtype)
    saved: PreTrainedModel = model.base_model if case.base_alone else model
    saved.save_pretrained(folder / "model", max_shard_size=case.shard)
    model.config.architectures = [type(model).__name__]  # which that of the base model alone would not name
    model.config.save_pretrained(folder / "model")
    assert model.generation_config is not None
    model.generation_config.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    save_file({"tokens": tiny.tokens(6, 32, vocabulary=BYTES)}, folder / "tokens.safetensors")
    save_file({"tokens": tiny.tokens(4, 32, seed=3, vocabulary=BYTES)}, folder / "evaluation.safetensors")


def command(folder: Path, out: Path, options: str = "pruner=wanda rebuild.barber.alpha=0.9 export=hf") -> list[str]:
    return [
        "model=local",
        f"model.path={folder / 'model'}",
        "calibration=tokens",
        f"calibration.path={folder / 'tokens.safetensors'}",
        "evals=[perplexity,agreement]",
        "evals/text=tokens",
        f"evals.texts.tokens.path={folder / 'evaluation.safetensors'}",
        "evals.seqlen=32",
        "cache=off",
        "evals.sample.tokens=4",
        *options.split(),
        f"hydra.run.dir={out}",
    ]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take as long as all the rest."""
    monkeypatch.setattr("barber.run.notes.plot_losses", lambda blocks, name, path: path.write_bytes(b""))
    monkeypatch.setattr("barber.run.notes.plot_block_errors", lambda errors, name, path: path.write_bytes(b""))


def beside_shards(folder: Path) -> set[str]:
    """All files but for the shards of the model."""
    return {file for file in files_of(folder) if not file.startswith("model/model")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make(folder, CASES["llama"])
    return folder


def assert_the_same_model(found: Path, expected: Path) -> None:
    """File by file, but that one has a shard a layer."""
    stored, others = tensors_of(expected), tensors_of(found)
    assert others.keys() == stored.keys()
    for name, tensor in stored.items():
        assert others[name].dtype == tensor.dtype, name
        assert torch.equal(others[name], tensor), name
    state = loaded(expected).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded(found).state_dict().items())
    assert AutoTokenizer.from_pretrained(found)("It is")["input_ids"]
    for file in expected.iterdir():
        if file.suffix == ".json":
            assert json.loads((found / file.name).read_text()) == json.loads(file.read_text()), file.name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_streamed_run_leaves_what_one_in_memory_leaves(case: Case, tmp_path: Path) -> None:
    make(tmp_path, case)
    if case.shard != "5GB":
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    before = contents(tmp_path / "model")
    outs = {streaming: tmp_path / f"streaming-{streaming}" for streaming in ("false", "true")}
    for streaming, out in outs.items():
        done(*command(tmp_path, out, case.options), f"engine.streaming={streaming}")
    expected, found = outs["false"], outs["true"]
    record, other = record_of(expected), record_of(found)
    for key in ("results", "sparsity", "linears", "calibration", "seeds", "files"):
        assert other[key] == record[key], key
    stages = ["dense", "pruned"] if "rebuild=none" in case.options else ["dense", "pruned", "rebuilt"]
    assert list(record["results"]) == stages
    for stage in stages:
        assert {"perplexity", "sample"} <= record["results"][stage].keys()
    assert len({record["results"][stage]["perplexity"]["tokens"]["perplexity"] for stage in stages}) == len(stages)
    assert blocks_of(found) == blocks_of(expected)
    assert beside_shards(found) == beside_shards(expected)
    assert contents(tmp_path / "model") == before
    if "export=masks" in case.options:
        assert (found / "masks.safetensors").read_bytes() == (expected / "masks.safetensors").read_bytes()
    if "export=hf" in case.options:
        assert_the_same_model(found / "model", expected / "model")
        assert {parameter.dtype for parameter in loaded(found / "model").parameters()} == {case.dtype}
        cards = [(out / "model" / "README.md").read_text(encoding="utf-8") for out in (expected, found)]
        configs = [yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) for card in cards]
        assert [config["engine"].pop("streaming") for config in configs] == [False, True]
        assert configs[0] == configs[1]


def test_only_measuring_a_streamed_model_leaves_the_measurements(inputs: Path, tmp_path: Path) -> None:
    outs = [tmp_path / streaming for streaming in ("false", "true")]
    for out in outs:
        done(*command(inputs, out, "pruner=none rebuild=none"), f"engine.streaming={out.name}")
    assert record_of(outs[0])["results"] == record_of(outs[1])["results"]
    assert list(record_of(outs[1])["results"]) == ["dense"]
    assert beside_shards(outs[0]) == beside_shards(outs[1])


def test_only_pruning_it_leaves_the_same_model(inputs: Path, tmp_path: Path) -> None:
    plain = [a for a in command(inputs, tmp_path, "pruner=wanda rebuild.barber.alpha=0.9") if not a.startswith("evals")]
    for streaming in ("false", "true"):
        done(*plain, "evals=none", f"engine.streaming={streaming}", f"hydra.run.dir={tmp_path / streaming}")
    assert_the_same_model(tmp_path / "true" / "model", tmp_path / "false" / "model")
    assert record_of(tmp_path / "true")["linears"] == record_of(tmp_path / "false")["linears"]


def test_where_activations_wait_changes_nothing_of_a_run(inputs: Path, tmp_path: Path) -> None:
    outs = {"device": tmp_path / "device", "disk": tmp_path / "disk"}
    for place, out in outs.items():
        done(*command(inputs, out), f"engine.streaming={place == 'disk'}", f"engine.activations={place}")
    expected, found = outs.values()
    assert record_of(found)["results"] == record_of(expected)["results"]
    assert blocks_of(found) == blocks_of(expected)
    assert_the_same_model(found / "model", expected / "model")
    assert beside_shards(found) == beside_shards(expected)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_that_fails_leaves_no_file_of_its_activations(streaming: str, inputs: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    save_model(model, tmp_path / "model")
    out = tmp_path / "out"
    places = [f"model.path={tmp_path / 'model'}", "engine.activations=disk", f"engine.streaming={streaming}"]
    result = barber(*command(inputs, out), "evals.stages=[rebuilt]", "evals.agreement=null", *places)
    assert (result.code, result.err) == (1, "barber: model.layers.0.mlp.up_proj: the weight is NaN or infinite\n")
    assert {file for file in files_of(out) if "/" not in file} == {"record.json", "layers.jsonl", "run.log"}


def test_a_random_model_is_streamed_too_and_its_files_do_not_stay(inputs: Path, tmp_path: Path) -> None:
    for streaming in ("false", "true"):
        arguments = command(inputs, tmp_path / streaming)[2:]
        done("model=tiny", *arguments, "evals.agreement=null", f"engine.streaming={streaming}")
    expected, found = tmp_path / "false", tmp_path / "true"
    assert record_of(found)["results"] == record_of(expected)["results"]
    assert beside_shards(found) == beside_shards(expected)
    stored, others = tensors_of(expected / "model"), tensors_of(found / "model")
    assert others.keys() == stored.keys()
    assert all(torch.equal(others[name], tensor) for name, tensor in stored.items())


Change = Callable[[dict[str, torch.Tensor]], Any]


def spoilt(inputs: Path, folder: Path, change: Change) -> Path:
    """A copy of the model whose tensors are changed."""
    shutil.copytree(inputs / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_without_a_tensor_is_refused_before_anything_is_done(inputs: Path, tmp_path: Path) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    source, out = spoilt(inputs, tmp_path / "model", lambda tensors: tensors.pop(missing)), tmp_path / "out"
    arguments = [*command(inputs, out), "engine.streaming=true", "evals.stages=[rebuilt]", "evals.agreement=null"]
    sentence = complaint(barber(*arguments, f"model.path={source}"))
    assert sentence.startswith("model.path must hold every weight of the model by its name; ")
    assert f"{source} has no {missing};" in sentence
    assert not (out / "layers.jsonl").exists()
    done(*arguments)  # the folder is free for the right model
