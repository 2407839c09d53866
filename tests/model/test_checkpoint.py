"""Finished layers on disk: whenever a run is killed, what is there then leads to the same bits as if it had not been.

A killed process leaves the files as they are at that moment, so copies of the folder, made at every step on the way,
stand for all the moments at which it may happen.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from barber import (
    GBLM,
    NM,
    Barber,
    BlockReport,
    LeastSquares,
    Magnitude,
    SparseGPT,
    Swaps,
    Unstructured,
    Wanda,
)
from barber.model import checkpoint as checkpoints
from barber.model.checkpoint import Checkpoint
from barber.model.decoder import Decoder
from barber.model.difference import Difference
from barber.model.stream import Streamed, opened
from barber.model.weights import InMemory, Weights
from barber.runtime.activations import Activations, ActivationStore, Place
from barber.runtime.files import PutInPlaceLater
from barber.runtime.precision import Precision
from tests import tiny
from tests.cli.running import save_model
from tests.pruning import prune

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"pattern": Unstructured(0.5), "pruner": Wanda(), "rebuild": Barber(alpha=0.9)}

both = pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])


class AtOnce(Executor):
    """No thread of its own: every step comes at its place."""

    def submit(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments, **named))
        except Exception as error:
            done.set_exception(error)
        return done


@dataclass
class Outcome:
    """What a run leaves: the model's tensors, the figures of its blocks, and where it was pruned initially."""

    tensors: dict[str, torch.Tensor]
    blocks: list[BlockReport]
    differences: dict[str, Difference]
    computed: list[int] = field(default_factory=list)


def saved(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    model = tiny.model(name, **changes)
    save_model(model, folder)
    return model


def run(source: Path, folder: Path, streamed: bool, scratch: Path | None = None, **options: Any) -> Outcome:
    """Prune the model in `source` with its finished layers in `folder`; goes on with those that are there."""
    config = AutoConfig.from_pretrained(source)
    checkpoint = Checkpoint(folder, config.num_hidden_layers, _later=PutInPlaceLater(AtOnce()))
    weights: Weights
    if streamed:
        model, files = opened(config, source, None)
        weights = Streamed(model, files, checkpoint)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, config=config)
        weights = InMemory(model, checkpoint)
    outcome = Outcome({}, [], {})

    def look(block: BlockReport, result: object) -> None:
        outcome.blocks.append(block)
        if result is not None:
            outcome.computed.append(block.layer)

    def note(index: int, differences: dict[str, Difference]) -> None:
        outcome.differences |= differences

    options = OPTIONS | {"batch_size": 3} | options
    prune(
        model,
        tiny.tokens(7),
        weights=weights,
        checkpoint=checkpoint,
        scratch=scratch,
        on_block=look,
        on_layer=note,
        **options,
    )
    outcome.tensors = {name: tensor.clone() for name, tensor in weights.state()}
    return outcome


def assert_the_same(found: Outcome, expected: Outcome) -> None:
    """Bit by bit, but for the seconds that blocks took."""
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name
    assert [replace(block, seconds=0) for block in found.blocks] == [
        replace(block, seconds=0) for block in expected.blocks
    ]
    assert found.differences.keys() == expected.differences.keys()
    for name, difference in expected.differences.items():
        for part in ("places_K", "values_K", "initial", "final"):
            assert torch.equal(getattr(found.differences[name], part), getattr(difference, part)), (name, part)


@contextmanager
def copied_at_every_step(folder: Path, to: Path) -> Iterator[list[Path]]:
    """Copies of a folder before every write, every fsync, every rename, every removal, and at the end."""
    copies: list[Path] = []
    seen: list[tuple[str, int]] = []

    def copy() -> None:
        nonlocal seen
        now = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
        if now != seen:
            seen = now
            copies.append(shutil.copytree(folder, to / f"{len(copies):03}"))

    def copying(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            copy()
            return function(*arguments, **named)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "open"), (Path, "write_text"), (os, "fsync")):
            patch.setattr(owner, name, copying(getattr(owner, name)))
        patch.setattr(checkpoints, "save_file", copying(checkpoints.save_file))
        yield copies
    copy()


def num_finished(folder: Path) -> int:
    return len(list(folder.glob("layer-*.json")))


@pytest.mark.parametrize(("streamed", "num_layers"), [(False, 3), (True, 2)], ids=["in memory", "streamed"])
def test_whenever_a_run_is_killed_it_goes_on_to_the_same_bits(streamed: bool, num_layers: int, tmp_path: Path) -> None:
    saved("llama", tmp_path / "model", num_hidden_layers=num_layers)
    (tmp_path / "whole").mkdir()
    with copied_at_every_step(tmp_path / "whole", tmp_path / "copies") as copies:
        expected = run(tmp_path / "model", tmp_path / "whole", streamed)
    assert expected.computed == [layer for layer in range(num_layers) for _ in ("attention", "mlp")]
    assert len(copies) > 6 * num_layers
    assert {num_finished(copy) for copy in copies} == set(range(num_layers + 1))
    assert not list(copies[-1].glob("activations-*"))
    for copy in copies:
        finished = num_finished(copy)
        kept = [path.name for path in copy.glob("activations-*")]  # what the next layer needs, no more
        assert len(kept) <= 2 and (finished in (0, num_layers) or f"activations-{finished:05d}.safetensors" in kept)
        found = run(tmp_path / "model", copy, streamed)
        assert_the_same(found, expected)
        assert found.computed == expected.computed[2 * finished :]
        assert found.blocks[: 2 * finished] == expected.blocks[: 2 * finished]


VARIANTS: dict[str, dict[str, Any]] = {
    "one stream": {"pruner": Magnitude()},
    "no rebuilding": {"rebuild": None},
    "no rebuilding and no inputs": {"rebuild": None, "pruner": Magnitude()},
    "interleaved": {"schedule": "interleaved"},
    "retained": {"pruner": SparseGPT(), "rebuild": Barber(alpha=0.9, retain_reconstruction=True)},
    "gradients of the loss": {"pruner": GBLM()},
    "2:4": {"pattern": NM(2, 4), "batch_size": 7},
    "bfloat16": {"precision": Precision("bfloat16", "bfloat16")},
    "on disk": {"activations": "disk", "batch_size": 2},
}


FOLLOWING: dict[str, Any] = {"rebuild": [Swaps(follow=0.5), LeastSquares(follow=1.0)]}
CASES = {
    **{name: ("llama", False, options) for name, options in VARIANTS.items()},
    **{f"following, streamed: {streamed}": ("llama", streamed, FOLLOWING) for streamed in (False, True)},
    **{f"{name}, streamed: {each}": (name, each, {}) for name in ("gpt2", "opt", "gemma2") for each in (False, True)},
}


@pytest.mark.parametrize(("family", "streamed", "options"), CASES.values(), ids=CASES)
def test_so_it_is_with_every_method_and_other_families(
    family: str, streamed: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    """And the half-written files of the killed run do no harm."""
    saved(family, tmp_path / "model")
    (tmp_path / "whole").mkdir()
    with copied_at_every_step(tmp_path / "whole", tmp_path / "copies") as copies:
        expected = run(tmp_path / "model", tmp_path / "whole", streamed, tmp_path, **options)
    copy = next(copy for copy in copies if num_finished(copy) == 1)
    for name in ("layer-00001", "activations-00001", "pruned-00001"):
        (copy / f".{name}.safetensors.abc.unfinished").write_bytes(b"half")
    (copy / ".layer-00001.json.abc.unfinished").write_text("[{")
    found = run(tmp_path / "model", copy, streamed, tmp_path, **options)
    assert found.computed == [1, 1]
    assert_the_same(found, expected)


def test_a_run_in_memory_is_gone_on_with_by_a_streamed_one_and_the_other_way_round(tmp_path: Path) -> None:
    saved("llama", tmp_path / "model")
    for streamed in (False, True):
        folder = tmp_path / str(streamed)
        (folder / "whole").mkdir(parents=True)
        with copied_at_every_step(folder / "whole", folder / "copies") as copies:
            expected = run(tmp_path / "model", folder / "whole", streamed)
        copy = next(copy for copy in copies if num_finished(copy) == 1)
        assert_the_same(run(tmp_path / "model", copy, not streamed), expected)


@both
def test_what_is_on_disk_are_whole_safetensors_in_the_models_dtype(streamed: bool, tmp_path: Path) -> None:
    model = tiny.model("gpt2").bfloat16()
    save_model(model, tmp_path / "model")
    (tmp_path / "whole").mkdir()
    outcome = run(tmp_path / "model", tmp_path / "whole", streamed)
    for index, layer in enumerate(Decoder(model).layers):
        tensors = load_file(tmp_path / "whole" / f"layer-{index:05d}.safetensors")
        assert set(tensors) == set(layer.module.state_dict(prefix=f"{layer.name}."))
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert all(torch.equal(tensor, outcome.tensors[name]) for name, tensor in tensors.items())
        reports = json.loads((tmp_path / "whole" / f"layer-{index:05d}.json").read_text())["content"]["reports"]
        assert [BlockReport(**report) for report in reports] == outcome.blocks[2 * index : 2 * index + 2]


def test_the_checkpoints_own_thread_gives_the_same_files(tmp_path: Path) -> None:
    saved("llama", tmp_path / "model", num_hidden_layers=3)
    folders = tmp_path / "at once", tmp_path / "in a thread"
    for folder in folders:
        folder.mkdir()
    run(tmp_path / "model", folders[0], streamed=False)
    model = type(tiny.model()).from_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(folders[1], 3)
    prune(model, tiny.tokens(7), weights=InMemory(model, checkpoint), checkpoint=checkpoint, batch_size=3, **OPTIONS)
    checkpoint.wait()
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_full_disk_ends_the_run_and_the_layer_counts_as_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = tiny.model("llama", num_hidden_layers=4)
    checkpoint = Checkpoint(tmp_path, 4)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        prune(model, tiny.tokens(), weights=InMemory(model, checkpoint), checkpoint=checkpoint, **OPTIONS)
    assert Checkpoint(tmp_path, 4).num_finished == 0


def test_a_checkpoint_is_all_that_the_function_call_needs(tmp_path: Path) -> None:
    expected = tiny.model("llama")
    prune(expected, tiny.tokens(), **OPTIONS)
    for _ in ("first", "again"):
        model = tiny.model("llama")
        prune(model, tiny.tokens(), checkpoint=Checkpoint(tmp_path, 2), **OPTIONS)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


# The streams


def stream(place: Place, num_samples: int, dtype: torch.dtype, folder: Path, seed: int = 0) -> Activations:
    made = ActivationStore(place, CPU, dtype, folder).empty(num_samples, 3, 4)
    made[0:num_samples] = torch.randn(num_samples, 3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_streams_are_restored_bit_by_bit(batch_size: int, place: Place, dtype: torch.dtype, tmp_path: Path) -> None:
    streams = {name: stream(place, 5, dtype, tmp_path, seed) for seed, name in enumerate(("pruned", "rebuilt"))}
    checkpoint = Checkpoint(tmp_path, 2)
    checkpoint.write_layer(0, {"weight": torch.ones(2)}, "its digest")
    checkpoint.finish_layer(0, [], {}, streams, batch_size, 5)
    checkpoint.wait()
    held = load_file(tmp_path / "activations-00001.safetensors")
    assert all(torch.equal(held[name], streams[name][0:5]) for name in ("pruned", "rebuilt"))
    for other_batch_size in (1, 3, 5):  # another batch size may read them
        fresh = {name: stream(place, 5, dtype, tmp_path, seed=9) for name in streams}
        Checkpoint(tmp_path, 2).restore(fresh, other_batch_size, 5)
        assert all(torch.equal(fresh[name][0:5], streams[name][0:5]) for name in streams)


def test_one_stream_under_two_names_is_on_disk_once(tmp_path: Path) -> None:
    only = stream("device", 5, torch.float32, tmp_path)
    checkpoint = Checkpoint(tmp_path, 2)
    checkpoint.finish_layer(0, [], {}, {"pruned": only, "rebuilt": only}, 2, 5)
    checkpoint.wait()
    assert list(load_file(tmp_path / "activations-00001.safetensors")) == ["pruned"]
    fresh = stream("device", 5, torch.float32, tmp_path, seed=9)
    Checkpoint(tmp_path, 2).restore({"pruned": fresh, "rebuilt": fresh}, 2, 5)
    assert torch.equal(fresh[0:5], only[0:5])
