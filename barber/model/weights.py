"""Where the weights of the decoder layers are: here in the model; see `stream` for those on disk."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel

from barber.model.checkpoint import Checkpoint
from barber.model.decoder import Decoder
from barber.model.difference import Difference
from barber.model.sources import untied
from barber.runtime.offload import Offload
from barber.runtime.tensors import Tensor, digest_of_tensors, moved

Stage = Literal["dense", "pruned", "rebuilt"]


class Weights(Protocol):
    """The weights of a model's decoder layers."""

    def onloaded(self, index: int, device: torch.device) -> AbstractContextManager[None]:
        """A layer on the device in float32; what its linears have at the end is kept, in the model's dtype."""
        ...

    def finish(self) -> None:
        """Wait until all finished layers are where they are kept."""
        ...

    def resident(self, index: int, device: torch.device) -> AbstractContextManager[None]:
        """A layer on the device as it is stored, to be run."""
        ...

    def showing(self, stage: Stage) -> AbstractContextManager[None]:
        """The model inside this context as it was before the walk, or with its initial or its final masks.

        `dense` only before the walk begins; `pruned` only if `note` was told of all layers.
        """
        ...

    def note(self, index: int, differences: Mapping[str, Difference]) -> None:
        """Remember where a layer's initially pruned weights differ from the final ones, by the name of the linear."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the model's state dict, in the order of their names."""
        ...

    def dense(self, index: int | None) -> Mapping[str, Tensor]:
        """The tensors of a layer, or of all that is outside of the layers (None), before the walk; by name."""
        ...

    def restore(self) -> None:
        """Take over the layers that the checkpoint has; the model is dense no more."""
        ...

    def write(self, folder: Path) -> None:
        """Write the model into a folder, as `save_pretrained` does."""
        ...


class InMemory:
    """The weights are the model's own.

    Args:
        model: a model with all its weights.
        checkpoint: gets a copy of every finished layer; those that it has already are taken over.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint | None = None) -> None:
        self.model, self._checkpoint = model, checkpoint
        self._layers = Decoder(model).layers
        self._differences: dict[str, Difference] = {}
        self._offload: Offload | None = None
        self._digests = ThreadPoolExecutor(1, thread_name_prefix="digests")

    def finish(self) -> None:
        if self._offload is not None:
            self._offload.wait()

    def dense(self, index: int | None) -> Mapping[str, Tensor]:
        if index is None:
            return untied(self.model, without=[layer.name for layer in self._layers])
        layer = self._layers[index]
        tensors: dict[str, Tensor] = layer.module.state_dict(prefix=f"{layer.name}.")
        return tensors

    def restore(self) -> None:
        for index in range(self._checkpoint.num_finished if self._checkpoint else 0):
            assert self._checkpoint is not None
            state = self._layers[index].module.state_dict(prefix=f"{self._layers[index].name}.")
            for name, tensor in self._checkpoint.layer(index).items():
                state[name].copy_(tensor)

    @contextmanager
    def onloaded(self, index: int, device: torch.device) -> Iterator[None]:
        layer = self._layers[index]
        if device.type == "cuda" and self._offload is None:
            self._offload = Offload(device)
        digest = self._digests.submit(digest_of_tensors, dict(self.dense(index))) if self._checkpoint else None
        with layer.onloaded(device, self._offload):
            if self._offload is not None and index + 1 < len(self._layers):
                following = self._layers[index + 1]
                self._offload.order(id(following), [tensor.data for tensor in following.tensors])
            yield
            dense = digest.result() if digest is not None else ""  # before the weights become others
        if self._checkpoint is not None:
            self.finish()
            self._checkpoint.write_layer(index, layer.module.state_dict(prefix=f"{layer.name}."), dense)

    @contextmanager
    def resident(self, index: int, device: torch.device) -> Iterator[None]:
        with moved(self._layers[index].tensors, device):
            yield

    def note(self, index: int, differences: Mapping[str, Difference]) -> None:
        self._differences.update(differences)

    @contextmanager
    def showing(self, stage: Stage) -> Iterator[None]:
        if stage != "pruned" or not self._differences:
            yield
            return
        linears = [linear for layer in self._layers for linear in layer.linears]
        undo: list[tuple[Tensor, Difference]] = []
        try:
            for linear in linears:
                undo.append((linear.weight_OI, self._differences[linear.name].put_into(linear.weight_OI)))
            yield
        finally:
            for weight_OI, difference in undo:
                difference.put_into(weight_OI)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from sorted(self.model.state_dict().items())

    def write(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
