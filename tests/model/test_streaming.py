"""A model whose decoder layers stay on disk: the same bits as in memory, and one layer in memory at a time."""

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from barber import NM, Barber, BlockReport, Magnitude, NumericsError, SparseGPT, Unstructured, UserError, Wanda
from barber.evals.agreement import Agreement
from barber.evals.cache import model_digest
from barber.evals.evaluation import Evaluation
from barber.evals.results import StageResults
from barber.evals.windows import WindowProtocol
from barber.model.checkpoint import Checkpoint
from barber.model.decoder import Decoder
from barber.model.sources import RandomModel, hollow
from barber.model.stream import Streamed, TensorFolder, opened
from barber.model.weights import InMemory, Weights
from barber.walk.walk import BlockResult
from tests import tiny
from tests.cli.running import contents, loaded, save_model, tensors_of
from tests.evals.measuring import Ids, quiet
from tests.pruning import prune

CPU = torch.device("cpu")
# Of every kind of embedding, head, norm and layer one.
NAMES = ["cohere", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "opt", "opt/post-norm", "phi3", "smollm3"]
OPTIONS: dict[str, Any] = {"pattern": Unstructured(0.5), "pruner": Wanda(), "rebuild": Barber(alpha=0.9)}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
STAGES = ("dense", "pruned", "rebuilt")


@dataclass
class Run:
    """A pruned model, where its weights are, and the figures of its blocks."""

    model: PreTrainedModel
    weights: Weights
    checkpoint: Checkpoint | None
    blocks: list[BlockReport]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.weights.state()}


def in_memory(source: Path, **options: Any) -> Run:
    model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True).eval()
    weights = InMemory(model)
    return pruned(model, weights, None, **options)


def streamed(source: Path, folder: Path, dtype: torch.dtype | None = None, **options: Any) -> Run:
    model, tensors = opened(AutoConfig.from_pretrained(source), source, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(folder, len(Decoder(model).layers))
    return pruned(model, Streamed(model, tensors, checkpoint), checkpoint, **options)


def pruned(model: PreTrainedModel, weights: Weights, checkpoint: Checkpoint | None, **options: Any) -> Run:
    options = OPTIONS | {"batch_size": 4} | options
    report = prune(model, tiny.tokens(6), weights=weights, checkpoint=checkpoint, on_layer=weights.note, **options)
    return Run(model, weights, checkpoint, [replace(block, seconds=0) for block in report.blocks])


def written(run: Run, folder: Path) -> Path:
    """The model as a Hugging Face folder."""
    folder.mkdir(parents=True)
    run.weights.write(folder)
    return folder


def assert_the_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    save_model(tiny.model(name, **changes).to(dtype), folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Change the tensors of a folder with one file."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_empty(model: PreTrainedModel) -> None:
    """No weight of a decoder layer is in memory."""
    for layer in Decoder(model).layers:
        assert {parameter.device.type for parameter in layer.module.parameters()} == {"meta"}


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_model_has_its_buffers_and_takes_no_memory_for_weights(name: str) -> None:
    expected = tiny.model(name)
    found = hollow(expected.config, torch.float32)
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}
    assert_the_same(dict(found.named_buffers()), dict(expected.named_buffers()))
    assert not torch.nn.Linear(2, 2).weight.is_meta  # what is built after it


# The same bits as in memory


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_model_is_pruned_to_the_same_bits(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "model")
    before = contents(source)
    expected, found = in_memory(source), streamed(source, tmp_path / "checkpoint")
    assert found.blocks == expected.blocks
    assert_the_same(found.tensors(), expected.tensors())
    assert_the_same(loaded(written(found, tmp_path / "out")).state_dict(), expected.model.state_dict())
    assert contents(source) == before
    assert_empty(found.model)


METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"pruner": Magnitude()},
    "sparsegpt, 2:4": {"pruner": SparseGPT(), "pattern": NM(2, 4)},
    "sparsegpt, retained": {"pruner": SparseGPT(), "rebuild": Barber(alpha=0.9, retain_reconstruction=True)},
    "merely pruned": {"rebuild": None},
    "interleaved": {"schedule": "interleaved"},
    "interleaved, whole blocks": {"schedule": "interleaved", "rebuild": Barber(alpha=0.9, granularity="block")},
    "activations on disk": {"activations": "disk"},
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_so_it_is_with_every_method(options: dict[str, Any], tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model")
    expected, found = in_memory(source, **options), streamed(source, tmp_path / "checkpoint", **options)
    assert found.blocks == expected.blocks
    assert_the_same(found.tensors(), expected.tensors())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt/post-norm"])
def test_a_model_keeps_the_dtype_that_it_is_stored_in(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save(name, tmp_path / "model", dtype)
    expected, found = in_memory(source), streamed(source, tmp_path / "checkpoint")
    assert found.blocks == expected.blocks
    model = loaded(written(found, tmp_path / "out"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_the_same(model.state_dict(), expected.model.state_dict())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_dtype_that_was_asked_for_is_that_of_all_weights_and_otherwise_that_of_the_config(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model", torch.bfloat16)
    rewrite(source, lambda tensors: {name: t.float() if "norm" in name else t for name, t in tensors.items()})
    expected, found = in_memory(source), streamed(source, tmp_path / "checkpoint")
    assert found.blocks == expected.blocks
    assert_the_same(found.tensors(), expected.tensors())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    expected = pruned(model, InMemory(model), None)
    found = streamed(source, tmp_path / "in float32", dtype=torch.float32)
    assert found.blocks == expected.blocks
    assert_the_same(loaded(written(found, tmp_path / "out")).state_dict(), expected.model.state_dict())


# How models lie on disk


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_model_may_be_in_many_files(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    save_model(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    before = contents(tmp_path / "many")
    one, many = (streamed(tmp_path / source, tmp_path / f"{source}-checkpoint") for source in ("one", "many"))
    assert many.blocks == one.blocks
    assert_the_same(many.tensors(), one.tensors())
    assert contents(tmp_path / "many") == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_names_may_lack_the_prefix_of_the_base_model_or_have_it_twice(name: str, tmp_path: Path) -> None:
    base = tiny.model(name).base_model_prefix
    source = save(name, tmp_path / "model")
    expected = in_memory(source)

    def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{base}."): tensor for key, tensor in tensors.items()}

    found = streamed(rewrite(source, without), tmp_path / "checkpoint")
    assert found.blocks == expected.blocks
    assert_the_same(loaded(written(found, tmp_path / "out")).state_dict(), expected.model.state_dict())

    def everywhere(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{base}.{key}": tensor for key, tensor in tensors.items()}

    again = streamed(rewrite(source, everywhere), tmp_path / "other-checkpoint")
    assert_the_same(again.tensors(), expected.tensors())


def test_the_base_model_alone_is_enough_where_the_head_is_tied_to_it(tmp_path: Path) -> None:
    save_model(tiny.model("gpt2").base_model, tmp_path / "model")  # as the one on the hub is
    assert "wte.weight" in load_file(tmp_path / "model" / "model.safetensors")
    expected, found = in_memory(tmp_path / "model"), streamed(tmp_path / "model", tmp_path / "checkpoint")
    assert_the_same(found.tensors(), expected.tensors())


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "cohere", "opt"])
def test_tied_weights_stay_tied_and_are_written_once(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "model", tie_word_embeddings=True)
    found = streamed(source, tmp_path / "checkpoint")
    assert found.model.get_output_embeddings().weight is found.model.get_input_embeddings().weight
    out = written(found, tmp_path / "out")
    assert set(stored_names(out)) == set(stored_names(source))
    model = loaded(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_head_beside_the_embedding_is_tied_where_they_are_equal_and_one_of_them_is_enough(tmp_path: Path) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    changes: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
        "equal": lambda tensors: tensors | {head: tensors[embedding].clone()},
        "another": lambda tensors: tensors | {head: tensors[embedding] + 1},
        "head alone": lambda tensors: {head: tensors.pop(embedding), **tensors},
    }
    for kind, change in changes.items():
        source = save("gemma2", tmp_path / kind)
        whole = AutoModelForCausalLM.from_pretrained(source)
        rewrite(source, change)
        found, _ = opened(AutoConfig.from_pretrained(source), source, None)
        assert torch.equal(found.model.embed_tokens.weight, whole.model.embed_tokens.weight)
        assert torch.equal(found.lm_head.weight, whole.lm_head.weight + (kind == "another"))
        assert (found.lm_head.weight is found.model.embed_tokens.weight) == (kind != "another")


def test_files_that_are_not_of_the_model_are_not_looked_at(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, source / "z.safetensors")
    files = TensorFolder(source, "model", None)
    assert_the_same({name: files.tensor(name) for name in tensors}, tensors)


@pytest.mark.parametrize("missing", ["model.norm", "lm_head", "model.embed_tokens", "model.layers.1.mlp.up_proj"])
def test_a_folder_without_a_tensor_is_refused_by_its_name(missing: str, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model")
    rewrite(source, lambda tensors: {name: t for name, t in tensors.items() if name != f"{missing}.weight"})
    with pytest.raises(UserError) as refusal:
        opened(AutoConfig.from_pretrained(source), source, None)
    assert refusal.value.field == "path"
    assert f"{source} has no {missing}.weight;" in str(refusal.value)


def test_what_is_read_may_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model")
    before = contents(source)
    for dtype in (None, torch.float32, torch.bfloat16):
        tensor = TensorFolder(source, "model", dtype).tensor("model.layers.0.mlp.up_proj.weight")
        tensor.zero_()
    assert contents(source) == before


# What is in memory


@contextmanager
def layers_in_memory(model: PreTrainedModel) -> Iterator[set[tuple[int, ...]]]:
    """Which decoder layers have weights in memory, whenever any module of them computes something."""
    layers = [layer.module for layer in Decoder(model).layers]
    seen: set[tuple[int, ...]] = set()

    def note(*_: Any) -> None:
        inside = [[parameter.device.type != "meta" for parameter in layer.parameters()] for layer in layers]
        assert all(all(parts) or not any(parts) for parts in inside)
        seen.add(tuple(index for index, parts in enumerate(inside) if any(parts)))

    modules = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear | nn.LayerNorm)]
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3_text"])
def test_one_layer_at_a_time_is_in_memory(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "model")
    model, tensors = opened(AutoConfig.from_pretrained(source), source, None)
    num_layers = len(Decoder(model).layers)
    checkpoint = Checkpoint(tmp_path, num_layers)
    weights = Streamed(model, tensors, checkpoint)
    assert_empty(model)
    prepared = evaluation()
    during: list[tuple[int, ...]] = []

    def look(block: BlockReport, _: object) -> None:
        assert_empty(model)
        during.append((block.layer,))

    one_by_one = {(index,) for index in range(num_layers)}
    with layers_in_memory(model) as seen:
        measure("dense", model, weights, prepared)
    assert seen == one_by_one
    with layers_in_memory(model) as seen:
        prune(model, tiny.tokens(6), weights=weights, checkpoint=checkpoint, on_block=look, **OPTIONS)
    assert seen == set(during) == one_by_one
    for stage in ("pruned", "rebuilt"):
        assert_empty(model)
        with layers_in_memory(model) as seen, weights.showing(stage):
            measure(stage, model, weights, prepared)
        assert seen == one_by_one
    assert_empty(model)


@pytest.mark.parametrize("streams", [False, True], ids=["in memory", "streamed"])
def test_nothing_of_a_finished_layer_is_held_through_the_next_one(streams: bool, tmp_path: Path) -> None:
    """Its dense, its initially pruned and its final weights in float32 are three layers more in memory."""
    model = tiny.model("llama", num_hidden_layers=3)
    weights: Weights = InMemory(model)
    checkpoint = None
    if streams:
        save_model(model, tmp_path / "model")
        model, tensors = opened(AutoConfig.from_pretrained(tmp_path / "model"), tmp_path / "model", None)
        checkpoint = Checkpoint(tmp_path, 3)
        weights = Streamed(model, tensors, checkpoint)
    results: dict[int, list[weakref.ref[torch.Tensor]]] = {}
    alive: list[int] = []

    def look(block: BlockReport, result: BlockResult | None) -> None:
        assert result is not None
        pruned = [pruned for linear in result.linears for pruned in (linear.initial, linear.final)]
        results.setdefault(block.layer, []).extend(weakref.ref(one.weight_OI) for one in pruned)

    def count(layer: int) -> Callable[..., None]:
        return lambda *_: alive.append(sum(ref() is not None for ref in results.get(layer - 1, [])))

    for index, layer in enumerate(Decoder(model).layers):
        layer.blocks[0].linears[0].module.register_forward_pre_hook(count(index))
    prune(model, tiny.tokens(6), weights=weights, checkpoint=checkpoint, on_block=look, **OPTIONS)
    assert set(alive) == {0}


@pytest.mark.parametrize("place", ["a layer", "the evaluation"])
def test_the_layers_are_empty_again_after_an_error(place: str, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model")

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
        return tensors

    model, tensors = opened(AutoConfig.from_pretrained(source), rewrite(source, spoil), None)
    checkpoint = Checkpoint(tmp_path, 2)
    weights = Streamed(model, tensors, checkpoint)
    if place == "a layer":
        with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj"):
            prune(model, tiny.tokens(6), weights=weights, checkpoint=checkpoint, **OPTIONS)
        assert checkpoint.num_finished == 1
    else:
        with pytest.raises(ZeroDivisionError), weights.resident(0, CPU):
            raise ZeroDivisionError
    assert_empty(model)


# What is measured


def measure(stage: Any, model: PreTrainedModel, weights: Weights, prepared: Any = None) -> StageResults:
    results: StageResults = (prepared or evaluation()).measure(stage, model, CPU, quiet, weights=weights)
    return results


def evaluation() -> Any:
    """Perplexity and agreement, the layers one by one."""
    protocol = WindowProtocol(12)
    settings = {"agreement": Agreement(10), "batch_size": 2, "placement": "layers"}
    return Evaluation(list(STAGES), {"text": Ids(60)}, [protocol], **settings).prepare(None, Path("nowhere"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_dense_cache_takes_it_for_the_same_model(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(source).eval()
    model, tensors = opened(AutoConfig.from_pretrained(source), source, None)
    assert model_digest(model, Streamed(model, tensors, None)) == model_digest(whole, InMemory(whole))
    assert_empty(model)


def test_showing_the_pruned_stage_changes_no_file(tmp_path: Path) -> None:
    run = streamed(save("llama", tmp_path / "model"), tmp_path / "checkpoint")
    assert run.checkpoint is not None
    run.checkpoint.wait()
    before, rebuilt = contents(tmp_path / "checkpoint"), run.tensors()
    with run.weights.showing("pruned"):
        for index, layer in enumerate(Decoder(run.model).layers):
            with run.weights.resident(index, CPU):
                for linear in layer.linears:
                    linear.weight_OI.mul_(2)  # as a device without memory of its own would
    assert contents(tmp_path / "checkpoint") == before
    assert_the_same(run.tensors(), rebuilt)


# What is written


def stored_names(folder: Path) -> Iterator[str]:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened_file:
            yield from opened_file.keys()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_folder_is_that_of_a_model_in_memory_but_for_its_shards(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "model", torch.bfloat16)
    generation = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(generation | {"max_new_tokens": 77}))
    expected, found = in_memory(source), streamed(source, tmp_path / "checkpoint")
    folders = written(expected, tmp_path / "in memory"), written(found, tmp_path / "streamed")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folders[0] / file).read_text()) == json.loads((folders[1] / file).read_text())
    assert json.loads((folders[1] / "generation_config.json").read_text())["max_new_tokens"] == 77
    assert sorted(stored_names(folders[0])) == sorted(stored_names(folders[1]))
    assert_the_same(loaded(folders[1]).state_dict(), loaded(folders[0]).state_dict())

    index = json.loads((folders[1] / "model.safetensors.index.json").read_text())
    num_shards = len(Decoder(found.model).layers) + 1
    shards = {f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)}
    assert set(index["weight_map"].values()) == shards == {path.name for path in folders[1].glob("*.safetensors")}
    assert sorted(index["weight_map"]) == sorted(stored_names(folders[1]))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(folders[1]).values())


def test_a_config_without_the_models_class_gets_it(tmp_path: Path) -> None:
    random = RandomModel("llama", {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48} | HEADS)
    source, _ = random.folder(tmp_path / "model")
    model, tensors = opened(random.config(), source, None)
    checkpoint = Checkpoint(tmp_path, 2)
    run = pruned(model, Streamed(model, tensors, checkpoint), checkpoint)
    out = json.loads((written(run, tmp_path / "out") / "config.json").read_text())
    assert (out["architectures"], out["dtype"]) == (["LlamaForCausalLM"], "float32")


def test_shards_are_copied_where_a_file_cannot_have_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Operation not permitted")

    run = streamed(save("llama", tmp_path / "model"), tmp_path / "checkpoint")
    linked = loaded(written(run, tmp_path / "linked")).state_dict()
    monkeypatch.setattr(os, "link", refuse)
    copied = written(run, tmp_path / "copied")
    assert run.checkpoint is not None
    run.checkpoint.remove()
    assert_the_same(loaded(copied).state_dict(), linked)
    assert_the_same(loaded(tmp_path / "linked").state_dict(), linked)  # whose files had two names


def test_the_source_may_be_gone_once_all_layers_are_finished(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model")
    run = streamed(source, tmp_path / "checkpoint")
    tensors = run.tensors()
    shutil.rmtree(source)
    assert_the_same(loaded(written(run, tmp_path / "out")).state_dict(), tensors)
