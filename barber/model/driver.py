"""The way of the samples through the decoder layers, of which one at a time is on the device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from barber.model.blocks import Call, Layer
from barber.model.decoder import Decoder, LayerInputs
from barber.model.weights import Weights
from barber.runtime.activations import Activations
from barber.runtime.numerics import FiniteChecks
from barber.runtime.precision import Arithmetic
from barber.runtime.products import fast_linears
from barber.runtime.tensors import Tensor, batches, in_float32

T = TypeVar("T")


@dataclass
class Stream:
    """The activations of this process's samples on their way through the layers.

    Args:
        hidden: what the layer at work is given.
        outputs: room for the outputs of a layer's blocks, as far as they are known.
    """

    inputs: LayerInputs
    hidden: Activations
    batch_size: int
    outputs: list[Activations] = field(default_factory=list)

    def calls(self, layer: int, samples: slice | None = None) -> Iterator[tuple[slice, Call]]:
        """The layer's call for every batch of samples, of all or of some; those are run one by one."""
        if samples is None:
            parts = batches(self.hidden.shape[0], self.batch_size)
        else:
            parts = (slice(number, number + 1) for number in range(samples.start, samples.stop))
        for batch in parts:
            yield batch, self.inputs.call(layer, self.hidden[batch])

    def advance(
        self, index: int, run: Callable[[slice, Call], Tensor], name: str, checks: FiniteChecks | None = None
    ) -> None:
        """Bring all samples to the next layer.

        Args:
            index: of the layer that they are given to.
            run: what the layer makes of a batch.
            name: of the layer, for the message.
            checks: told to look at the outputs.
        """
        for batch, call in self.calls(index):
            hidden_BLD = run(batch, call)
            if checks is not None:
                checks.order({f"{name}: its output": hidden_BLD})
            self.hidden[batch] = hidden_BLD

    def done(self, blocks: int, batch: slice) -> list[Tensor]:
        """The outputs of the layer's first blocks."""
        return [outputs[batch] for outputs in self.outputs[:blocks]]

    def residual(self, blocks: int, batch: slice) -> Tensor:
        """The residual stream after the layer's first blocks, if it adds their outputs as they are."""
        hidden_BLD = self.hidden[batch]
        for output_BLD in self.done(blocks, batch):
            hidden_BLD = hidden_BLD + output_BLD
        return hidden_BLD


@dataclass(frozen=True)
class Turn:
    """A decoder layer whose turn it is: it is on the device.

    Args:
        dense_OI: the weights of its linears as they were when it came, by name.
    """

    index: int
    layer: Layer
    dense_OI: Mapping[str, Tensor]


@dataclass(frozen=True)
class Driver:
    """Fetches one decoder layer after the other, whatever is done with it.

    Args:
        model: in evaluation mode.
        weights: where the layers' weights are.
        device: where the layers are computed.
        arithmetic: in which the linears compute, of layers that are only looked at; None: as they are stored.
        keeps: the layers come in float32, and what their linears have at the end is kept.
    """

    model: PreTrainedModel
    weights: Weights
    device: torch.device
    arithmetic: Arithmetic | None = None
    keeps: bool = False

    def each(self, look: Callable[[Turn], T], begin: int = 0, backwards: bool = False) -> Iterator[T]:
        """Show every layer, and give what `look` returns when the layer has left the device.

        Args:
            begin: the first layer to be shown.
            backwards: from the last layer to that one.
        """
        layers = Decoder(self.model).layers
        order = range(begin, len(layers))
        for index in reversed(order) if backwards else order:
            # Out of inference mode, which the caller may be in: no gradient can be had there, nor weights be kept.
            with torch.inference_mode(False), torch.no_grad(), self._onloaded(index, layers[index]) as dense_OI:
                found = look(Turn(index, layers[index], dense_OI))
            del dense_OI  # with it a layer in float32 would stay, and with what was found as much again
            yield found
            del found

    @contextmanager
    def _onloaded(self, index: int, layer: Layer) -> Iterator[dict[str, Tensor]]:
        """The layer on the device, as it is wanted."""
        if self.keeps:
            with self.weights.onloaded(index, self.device):
                yield _weights_of(layer)
            return
        with self.weights.resident(index, self.device):
            if self.arithmetic is None:
                yield _weights_of(layer)
                return
            with in_float32(layer.tensors, self.device), fast_linears([x.module for x in layer.linears], self.device):
                dense_OI = _weights_of(layer)
                with layer.using(dense_OI, self.arithmetic):
                    yield dense_OI


def outside_of_layers(model: PreTrainedModel) -> list[Tensor]:
    """The parameters and buffers of a model that are in none of its decoder layers: embedding, norm, head."""
    inside = {id(tensor) for layer in Decoder(model).layers for tensor in layer.tensors}
    return [tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in inside]


def _weights_of(layer: Layer) -> dict[str, Tensor]:
    return {linear.name: linear.weight_OI for linear in layer.linears}
