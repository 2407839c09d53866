"""Where a model is while it is measured: as a whole on the device, or one decoder layer at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from barber.model.decoder import Decoder
from barber.model.stream import Streamed
from barber.model.weights import InMemory, Weights
from barber.runtime.tensors import Tensor, moved, replaced_forward

Placement = Literal["auto", "whole", "layers"]

# of the device's memory, for the weights; the rest is for activations and logits
_SHARE_FOR_WEIGHTS = 0.7


def goes_by_layer(
    placement: Placement, model: PreTrainedModel, device: torch.device, weights: Weights | None = None
) -> bool:
    """Whether to bring the decoder layers to the device one at a time."""
    if isinstance(weights, Streamed):
        return True
    if placement != "auto" or device.type == "cpu":
        return placement == "layers"
    memory = torch.cuda.get_device_properties(device).total_memory
    return bool(model.get_memory_footprint() > _SHARE_FOR_WEIGHTS * memory)


@contextmanager
def placed(
    model: PreTrainedModel, device: torch.device, by_layer: bool, weights: Weights | None = None
) -> Iterator[None]:
    """The model ready to run on `device` inside this context; its weights at home stay where they are.

    Args:
        by_layer: a decoder layer comes when it is called and goes when it is done, so that any model fits of which one
            layer, the embedding and the head do.
        weights: where its layers' weights are; None: in the model.
    """
    layers = [layer.module for layer in Decoder(model).layers] if by_layer else []
    absent = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_on_call(layer, weights or InMemory(model), index, device))
        stack.enter_context(moved([tensor for tensor in _tensors(model) if id(tensor) not in absent], device))
        yield


@contextmanager
def _on_call(layer: nn.Module, weights: Weights, index: int, device: torch.device) -> Iterator[None]:
    forward = layer.forward

    def fetch_and_run(*args: Any, **kwargs: Any) -> Any:
        with weights.resident(index, device):
            return forward(*args, **kwargs)

    with replaced_forward(layer, fetch_and_run):
        yield


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
