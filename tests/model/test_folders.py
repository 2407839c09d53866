"""Folders that people have and that hold no model to prune: both loaders refuse them, in the same sentence."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from barber import Engine, UserError
from barber.model import sources
from barber.model.sources import Pretrained, skeleton
from tests import tiny
from tests.cli.running import save_model

UP = "model.layers.0.mlp.up_proj.weight"
Change = Callable[[Path], object]


def says(file: str, **entries: Any) -> Change:
    """More entries in a JSON file."""
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | entries))


def holds(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


def stores(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Other tensors."""
    file = "model.safetensors"
    return lambda folder: save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})


def scaled(suffix: str, dtype: torch.dtype) -> Change:
    """An up projection in 8 bits, with a scale."""
    return stores(lambda all_: all_ | {UP: all_[UP].to(dtype), UP + suffix: torch.ones(1)})


def indexed(index: str) -> Change:
    """An index, whose one file lies beside the folder."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(index.replace("FOLDER", str(folder.parent)))

    return change


def naming(file: object) -> Change:
    return indexed(json.dumps({"weight_map": {UP: file}}))


NO_MODEL, PLAIN = "must be a folder with a Hugging Face model; ", "must hold plain weights, not quantised ones; "
DEQUANTISE, NO_MAP = ": dequantise the model first", "must have an index whose weight_map gives every tensor its file; "
ELSEWHERE = "must have an index that names files of the folder; "
GATED = ["gate_proj", "up_proj"]
NAMES = [f"model.layers.1.mlp.{name}.weight" for name in GATED]

ODD: dict[str, tuple[Change, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), NO_MODEL + "FOLDER has no config.json"),
    "a config of nothing": (holds("config.json", "null"), NO_MODEL + "FOLDER/config.json holds no keys and values"),
    "a config that is a number": (holds("config.json", "7"), NO_MODEL + "FOLDER/config.json holds no keys and values"),
    "a config that is cut off": (holds("config.json", '{"mo'), NO_MODEL + "FOLDER/config.json cannot be read: ..."),
    "a config in depth": (holds("config.json", "[" * 10**5), NO_MODEL + "FOLDER/config.json cannot be read: ..."),
    "what is no number": (
        says("config.json", initializer_range=float("nan")),
        NO_MODEL + "FOLDER/config.json cannot be read: NaN is no number of JSON's",
    ),
    "a width in words": (
        says("config.json", hidden_size="wide"),
        NO_MODEL + "the config in FOLDER cannot be read: ...",
    ),
    "no heads": (says("config.json", num_attention_heads=0), NO_MODEL + "the config in FOLDER cannot be read: ..."),
    "padding outside of the vocabulary": (
        says("config.json", pad_token_id=tiny.VOCABULARY),
        "no model can be built from the config: Padding_idx must be within num_embeddings",
    ),
    "attention that is not installed": (
        says("config.json", attn_implementation="flash_attention_2"),
        "no model can be built from the config: FlashAttention2 has been toggled on...",
    ),
    "a generation config that is cut off": (
        holds("generation_config.json", "{"),
        NO_MODEL + "FOLDER/generation_config.json cannot be read: ...",
    ),
    "a generation config without sense": (
        holds("generation_config.json", '{"max_new_tokens": -1}'),
        NO_MODEL + "FOLDER/generation_config.json cannot be read: ...",
    ),
    "an adapter": (
        holds("adapter_config.json", "{}"),
        "must be a model without an adapter beside it; there is FOLDER/adapter_config.json: merge the adapter ...",
    ),
    "bitsandbytes": (
        says("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        PLAIN + "FOLDER/config.json has bitsandbytes as its quantization_config" + DEQUANTISE,
    ),
    "compressed tensors of old": (
        says("config.json", compression_config={"format": "dense"}),
        PLAIN + "FOLDER/config.json has compression_config" + DEQUANTISE,
    ),
    "modelopt": (holds("hf_quant_config.json", "{}"), PLAIN + "there is FOLDER/hf_quant_config.json" + DEQUANTISE),
    "float8": (
        stores(lambda all_: all_ | {UP: all_[UP].to(torch.float8_e4m3fn)}),
        PLAIN + f"FOLDER/model.safetensors has {UP} (F8_E4M3)" + DEQUANTISE,
    ),
    "float8 with scales": (scaled("_scale_inv", torch.float8_e4m3fn), PLAIN + "...dequantise..."),
    "int8 of bitsandbytes": (scaled(".absmax", torch.uint8), PLAIN + "...dequantise..."),
    "scales beside floats": (
        scaled("_scale", torch.bfloat16),
        PLAIN + f"FOLDER/model.safetensors has {UP}_scale (F32)" + DEQUANTISE,
    ),
    "narrower layers": (
        stores(lambda all_: all_ | {name: all_[name][:40].contiguous() for name in NAMES}),
        "must hold weights of the shapes that its config.json gives; model.layers.1.mlp.gate_proj.weight in "
        "FOLDER/model.safetensors is [40, 32] and not [48, 32]",
    ),
    "a larger vocabulary": (
        says("config.json", vocab_size=tiny.VOCABULARY + 1),
        "must hold weights of the shapes that its config.json gives; model.embed_tokens.weight in "
        f"FOLDER/model.safetensors is [{tiny.VOCABULARY}, 32] and not [{tiny.VOCABULARY + 1}, 32]",
    ),
    "an index that is a list": (
        indexed("[]"),
        NO_MODEL + "FOLDER/model.safetensors.index.json holds no keys and values",
    ),
    "an index without a map": (indexed("{}"), NO_MAP + "FOLDER/model.safetensors.index.json has none"),
    "an index of numbers": (naming(3), NO_MAP + "FOLDER/model.safetensors.index.json has none"),
    "an index of lists": (naming(["a"]), NO_MAP + "FOLDER/model.safetensors.index.json has none"),
    "an index that leads out": (
        naming("../outside.safetensors"),
        ELSEWHERE + "FOLDER/model.safetensors.index.json names ../outside.safetensors",
    ),
    "an index with a whole path": (
        naming("FOLDER/outside.safetensors"),
        ELSEWHERE + "FOLDER/model.safetensors.index.json names .../outside.safetensors",
    ),
    "an index of what is not there": (
        naming("inside.safetensors"),
        "must hold the files that FOLDER/model.safetensors.index.json names; inside.safetensors is not there",
    ),
    "a file that is cut off": (
        holds("model.safetensors", "safe"),
        "must hold the weights as safetensors; ... is none ...",
    ),
    "a file of another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
        "must hold the weights as safetensors; FOLDER has neither model.safetensors nor model.safetensors.index.json",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(tiny.model("llama"), folder)
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def refusal(load: Callable[[], object], folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        load()
    return refused.value.message.replace(str(folder), "FOLDER")


@pytest.mark.parametrize("odd", ODD)
def test_in_memory_and_streamed_the_same_folders_are_refused(odd: str, folder: Path, tmp_path: Path) -> None:
    change, expected = ODD[odd]
    change(folder)
    source = Pretrained(str(folder), local=True)

    def opened(streams: bool) -> None:
        skeleton(source.config())
        Engine().open(source, streams, None, tmp_path)

    sentences = [refusal(lambda streams=streams: opened(streams), folder) for streams in (False, True)]
    assert sentences[0] == sentences[1]
    assert re.fullmatch(".*".join(map(re.escape, expected.split("..."))), sentences[0]), sentences[0]


def test_tensors_that_the_model_has_no_place_for_are_spoken_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers does it for a model in memory."""
    bias, table = "model.layers.0.mlp.up_proj.bias", "model.layers.0.self_attn.rotary_emb.inv_freq"
    stores(lambda all_: all_ | {bias: torch.zeros(48), table: torch.zeros(4)})(folder)
    Engine().open(Pretrained(str(folder), local=True), True, None, tmp_path)
    assert f"{folder} has 1 tensors that the model has no place for, such as {bias}." in caplog.text


def test_what_the_hub_has_is_looked_at_once_it_is_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: str(folder))
    change, expected = ODD["modelopt"]
    change(folder)
    for path in ("organisation/name", str(folder)):  # a folder it may be as well
        source = Pretrained(path)
        assert refusal(source.load, folder) == refusal(lambda source=source: source.folder(folder), folder) == expected
