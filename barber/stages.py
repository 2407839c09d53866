"""The model with its initial masks, kept beside the rebuilt one without a second copy of the model.

The walk leaves the rebuilt model; the merely pruned one never existed as a whole. Where a weight differs between the
two, its value in the pruned one is kept: little for masks that differ in a few exchanged pairs, at most about a copy
of the linears for a pruner that updated its weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from barber.decoder import Decoder
from barber.tensors import Tensor
from barber.walk import LinearResult


class PrunedStage:
    """The differences of the pruned model from the rebuilt one."""

    def __init__(self) -> None:
        self._differences: dict[str, tuple[Tensor, Tensor]] = {}

    def collect(self, linear: LinearResult) -> None:
        """Note where the initially pruned weight of a linear differs from the final one."""
        initial_OI, final_OI = linear.initial.weight_OI, linear.final.weight_OI
        places_K = (initial_OI != final_OI).flatten().nonzero().squeeze(1)
        values_K = initial_OI.flatten()[places_K]
        self._differences[linear.name] = (places_K.to("cpu", torch.int32), values_K.cpu())

    @contextmanager
    def in_place(self, model: PreTrainedModel) -> Iterator[None]:
        """Turn the rebuilt model into the pruned one inside this context, and back."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: PreTrainedModel) -> None:
        for linear in Decoder(model).linears:
            places_K, values_K = self._differences[linear.name]
            weight_OI = linear.weight_OI
            flat = weight_OI.reshape(-1)  # a view of nn.Linear's weight, a copy of Conv1D's transposed one
            index_K = places_K.to(flat.device).long()
            before_K = flat[index_K].clone()
            flat[index_K] = values_K.to(flat)
            if not weight_OI.is_contiguous():
                weight_OI.copy_(flat.view_as(weight_OI))
            self._differences[linear.name] = (places_K, before_K.cpu())
