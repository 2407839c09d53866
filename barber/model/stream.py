"""A model whose decoder layers are on disk, from where one at a time is read."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from barber.errors import UserError
from barber.model.blocks import Layer
from barber.model.checkpoint import Checkpoint
from barber.model.decoder import Decoder
from barber.model.difference import Difference
from barber.model.families import family_of
from barber.model.folders import check_shapes, files_of, stored_name
from barber.model.sources import hollow, save_configs, untied
from barber.model.weights import Stage
from barber.runtime.files import HeldFile
from barber.runtime.tensors import Tensor, digest_of_tensors

log = logging.getLogger("barber")


class Streamed:
    """The weights are on disk: dense ones in the model's folder, those of finished layers in the checkpoint.

    Args:
        model: a model whose decoder layers are on the meta device, see `opened`.
        source: the dense model's tensors.
        checkpoint: where finished layers go; None: the model is only looked at.
    """

    def __init__(self, model: PreTrainedModel, source: "TensorFolder", checkpoint: Checkpoint | None) -> None:
        self.model, self._source, self._checkpoint = model, source, checkpoint
        self._layers = Decoder(model).layers
        self._stage: Stage = "rebuilt"
        self._resident: int | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._ahead: Future[dict[str, Tensor]] | None = None
        self._digests = ThreadPoolExecutor(1, thread_name_prefix="digests")

    def finish(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.wait()

    @contextmanager
    def onloaded(self, index: int, device: torch.device) -> Iterator[None]:
        layer = self._layers[index]
        tensors = self._ahead.result() if self._ahead is not None else self._source.tensors(layer)
        self._ahead = None
        if device.type == "cuda" and index + 1 < len(self._layers):  # on a CPU it would be a layer more in memory
            self._ahead = self._reader.submit(self._source.tensors, self._layers[index + 1])
        digest = self._digests.submit(digest_of_tensors, tensors) if self._checkpoint is not None else None
        with self._filled(layer, tensors, torch.device("cpu")):
            del tensors
            with layer.onloaded(device):
                yield
                dense = digest.result() if digest is not None else ""  # before the weights become others
            if self._checkpoint is not None:
                self._checkpoint.write_layer(index, layer.module.state_dict(prefix=f"{layer.name}."), dense)

    @contextmanager
    def resident(self, index: int, device: torch.device) -> Iterator[None]:
        if self._resident == index:
            yield
            return
        with self._filled(self._layers[index], self._stored(index), device):
            self._resident = index
            try:
                yield
            finally:
                self._resident = None

    def note(self, index: int, differences: Mapping[str, Difference]) -> None:
        """The checkpoint has them."""

    def dense(self, index: int | None) -> Mapping[str, Tensor]:
        if index is None:
            return untied(self.model, without=[layer.name for layer in self._layers])
        return self._source.tensors(self._layers[index])

    def restore(self) -> None:
        """They are read from the checkpoint."""

    @contextmanager
    def showing(self, stage: Stage) -> Iterator[None]:
        self._stage = stage
        try:
            yield
        finally:
            self._stage = "rebuilt"

    def state(self) -> Iterator[tuple[str, Tensor]]:
        owner = {
            name: index
            for index, layer in enumerate(self._layers)
            for name in layer.module.state_dict(prefix=f"{layer.name}.")
        }
        current: tuple[int, dict[str, Tensor]] = (-1, {})
        for name, tensor in sorted(self.model.state_dict().items()):
            if name not in owner:
                yield name, tensor
                continue
            if owner[name] != current[0]:
                current = (owner[name], self._stored(owner[name]))
            yield name, current[1][name]

    def write(self, folder: Path) -> None:
        """A shard for every layer, one for the rest; the layers' are those of the checkpoint, not copies."""
        assert self._checkpoint is not None
        rest = untied(self.model, without=[layer.name for layer in self._layers])
        total = len(self._layers) + 1
        index: dict[str, str] = {}
        size = 0
        for number in range(total):
            shard = folder / f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            if number == 0:
                stored = {self._source.renamed.get(name, name): tensor for name, tensor in rest.items()}
                save_file(stored, shard, {"format": "pt"})
            else:
                _link(self._checkpoint.layer_file(number - 1), shard)
            with safe_open(shard, framework="pt") as file:
                index |= dict.fromkeys(file.keys(), shard.name)
            size += _bytes_of_tensors(shard)
        head = {"metadata": {"total_size": size}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(head, indent=2), encoding="utf-8")
        save_configs(self.model, folder)

    def _stored(self, index: int) -> dict[str, Tensor]:
        if self._stage == "dense" or self._checkpoint is None or index >= self._checkpoint.num_finished:
            return self._source.tensors(self._layers[index])
        tensors = self._checkpoint.layer(index)
        if self._stage == "pruned":
            differences = self._checkpoint.differences(index)
            for linear in self._layers[index].linears:
                differences[linear.name].put_into(linear.turned(tensors[f"{linear.name}.weight"]))
        return tensors

    @contextmanager
    def _filled(self, layer: Layer, tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
        """The layer with its tensors inside this context, and without them after it."""
        empty = layer.module.state_dict()
        state = {name.removeprefix(f"{layer.name}."): tensor.to(device) for name, tensor in tensors.items()}
        buffers = [buffer for buffer in layer.module.buffers() if buffer.device != device]
        homes = [buffer.data for buffer in buffers]
        try:
            layer.module.load_state_dict(state, strict=True, assign=True)
            for buffer in buffers:
                buffer.data = buffer.data.to(device)
            for parameter in layer.module.parameters():
                parameter.requires_grad_(False)
            yield
        finally:
            layer.module.load_state_dict(empty, assign=True)
            for buffer, home in zip(buffers, homes, strict=True):
                buffer.data = home


class TensorFolder:
    """The tensors of a model in a Hugging Face folder, read one at a time, from the files that were there at first.

    Args:
        folder: with safetensors, one file or many with their index.
        base: the prefix that the names in the folder may lack, or have where the model has none.
        dtype: what floating tensors become; None: they stay.
        renamed: names in the model, and what files call them.
    """

    def __init__(
        self, folder: Path, base: str, dtype: torch.dtype | None, renamed: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self._base, self._dtype, self.renamed = folder, base, dtype, dict(renamed or {})
        self._files: dict[str, HeldFile] = {}
        for file in files_of(folder):
            held = HeldFile(file)
            with safe_open(held.path, framework="pt") as opened_file:
                self._files |= dict.fromkeys(opened_file.keys(), held)

    def find(self, name: str) -> str | None:
        """A tensor's name in the folder; None where there is no such tensor."""
        return stored_name(name, self._files, self._base, self.renamed)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the model.

        Raises:
            UserError: there is none.
        """
        stored = self.find(name)
        if stored is None:
            raise self.misses(name)
        # Opened anew each time: a mapped file counts as memory of the process.
        with safe_open(self._files[stored].path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor.to(self._dtype) if tensor.is_floating_point() and self._dtype is not None else tensor.clone()

    def others(self, model: PreTrainedModel) -> set[str]:
        """The names of tensors that are not the model's, but for those that transformers is silent about, too."""
        known = {self.find(name) for name in model.state_dict()}
        passed_over = ["rotary_emb.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())]
        names = set(self._files) - known
        return {name for name in names if not any(re.search(pattern, name) for pattern in passed_over)}

    def misses(self, name: str) -> UserError:
        """The error of a tensor that is not there."""
        return UserError(
            f"must hold every weight of the model by its name; {self.folder} has no {name}; "
            "with engine.streaming=false transformers may find it under another",
            field="path",
        )

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """All tensors of a layer, by their names in the model."""
        return {name: self.tensor(name) for name in layer.module.state_dict(prefix=f"{layer.name}.")}


def opened(config: PreTrainedConfig, folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, TensorFolder]:
    """A model whose decoder layers are empty and whose other tensors are read from a folder.

    Args:
        dtype: of the weights; None: the config's.

    Raises:
        UserError: a tensor is missing, or of another shape.
    """
    dtype = dtype or config.dtype
    model, renamed = hollow(config, dtype), family_of(config).stored_as
    check_shapes(folder, model, renamed)
    source = TensorFolder(folder, model.base_model_prefix, dtype, renamed)
    layers = Decoder(model).layers
    missing: set[str] = set()
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "meta":
            continue
        if source.find(name) is None:
            missing.add(name)
        elif not any(name.startswith(f"{layer.name}.") for layer in layers):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).load_state_dict({leaf: source.tensor(name)}, strict=False, assign=True)
    # As from_pretrained does it: whichever of two tied tensors is there serves both, two that differ are not tied.
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise source.misses(min(missing))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if others := source.others(model):
        log.warning("%s has %d tensors that the model has no place for, such as %s.", folder, len(others), min(others))
    return model.eval(), source


def _bytes_of_tensors(file: Path) -> int:
    """The size of a safetensors file less its head, whose length it begins with."""
    with file.open("rb") as opened_file:
        return file.stat().st_size - 8 - int.from_bytes(opened_file.read(8), "little")


def _link(file: Path, to: Path) -> None:
    """The same file under another name, or a copy where the file system has no such thing."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
