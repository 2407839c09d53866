"""A model run over windows of tokens: logits, the last layer's output and, where asked for, every block's."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from barber.model.blocks import main_output
from barber.model.decoder import Decoder
from barber.model.driver import Driver, Turn
from barber.model.weights import InMemory, Weights
from barber.runtime.activations import ActivationStore, Place
from barber.runtime.tensors import Tensor, batches


@dataclass(frozen=True)
class Batch:
    """What came out for a batch of windows; `hidden_BLD` is what the last decoder layer gave."""

    windows: slice
    tokens_BL: Tensor
    hidden_BLD: Tensor
    logits_BLV: Tensor


@dataclass
class BlockOutputs:
    """The output of every block at some positions of the windows, spread evenly over all of them.

    Args:
        positions_P: the positions, counted through all windows.
        found: by layer and name of the block, (P, D), batch by batch, on the CPU.
    """

    positions_P: Tensor
    found: dict[str, list[Tensor]] = field(default_factory=dict)

    @contextmanager
    def watching(self, decoder: Decoder, windows: slice, seqlen: int) -> Iterator[None]:
        """Take down the outputs while a batch of windows goes through the layers."""
        inside = (self.positions_P >= windows.start * seqlen) & (self.positions_P < windows.stop * seqlen)
        rows_P = self.positions_P[inside] - windows.start * seqlen

        def hook(name: str) -> Callable[..., None]:
            def take(module: nn.Module, args: Any, output: Any) -> None:
                y = main_output(output)
                flat = y.reshape(-1, y.shape[-1])
                self.found.setdefault(name, []).append(flat[rows_P.to(flat.device)].cpu())

            return take

        with ExitStack() as stack:
            for index, layer in enumerate(decoder.layers):
                for block in layer.blocks:
                    handle = block.modules[-1].register_forward_hook(hook(f"{index}.{block.name}"))
                    stack.callback(handle.remove)
            yield

    def joined(self) -> dict[str, Tensor]:
        """The outputs of all batches, (P, D) a block."""
        return {name: torch.cat(parts) for name, parts in self.found.items()}


@dataclass(frozen=True)
class Forward:
    """Runs a model that has been placed (`placement.placed`).

    Args:
        by_layer: take all windows through one decoder layer before the next is fetched: one transfer of the model for
            all of them.
        weights: where the layers' weights are; None: in the model.
        activations: where, with `by_layer`, the windows wait between two layers.
        scratch: a folder for the files of `activations=disk`.
    """

    model: PreTrainedModel
    device: torch.device
    batch_size: int
    by_layer: bool
    weights: Weights | None = None
    activations: Place = "auto"
    scratch: Path | None = None

    def steps(self, num_windows: int) -> int:
        """How often `progress` will be called with 1 a window."""
        return num_windows * (len(Decoder(self.model).layers) + 1 if self.by_layer else 1)

    def __call__(
        self, tokens_NL: Tensor, outputs: BlockOutputs | None, progress: Callable[[int], None]
    ) -> Iterator[Batch]:
        """The batches, in order. `progress` is told the number of windows that made a step."""
        run = self._layer_by_layer if self.by_layer else self._whole
        yield from run(tokens_NL, outputs, progress)

    def _whole(
        self, tokens_NL: Tensor, outputs: BlockOutputs | None, progress: Callable[[int], None]
    ) -> Iterator[Batch]:
        decoder = Decoder(self.model)
        for batch in batches(len(tokens_NL), self.batch_size):
            tokens_BL = tokens_NL[batch].to(self.device)
            with _watched(outputs, decoder, batch, tokens_NL), _output_of(decoder.layers[-1].module) as seen:
                logits_BLV = self.model(input_ids=tokens_BL, use_cache=False).logits
            yield Batch(batch, tokens_BL, seen[0], logits_BLV)
            progress(len(tokens_BL))

    def _layer_by_layer(
        self, tokens_NL: Tensor, outputs: BlockOutputs | None, progress: Callable[[int], None]
    ) -> Iterator[Batch]:
        decoder = Decoder(self.model)
        store = ActivationStore(
            self.activations, self.device, self.model.get_input_embeddings().weight.dtype, self.scratch
        )
        inputs = decoder.inputs(tokens_NL, self.batch_size, store, dtype=None)
        hidden = inputs.hidden
        weights = self.weights or InMemory(self.model)

        def run(turn: Turn) -> None:
            for batch in batches(len(tokens_NL), self.batch_size):
                with _watched(outputs, decoder, batch, tokens_NL):
                    hidden[batch] = turn.layer.run(inputs.call(turn.index, hidden[batch]))
                progress(batch.stop - batch.start)

        deque(Driver(self.model, weights, self.device).each(run), maxlen=0)
        for batch in batches(len(tokens_NL), self.batch_size):
            tokens_BL, hidden_BLD = tokens_NL[batch].to(self.device), hidden[batch]
            yield Batch(batch, tokens_BL, hidden_BLD, decoder.logits(tokens_BL, hidden_BLD))
            progress(batch.stop - batch.start)


@contextmanager
def _watched(outputs: BlockOutputs | None, decoder: Decoder, batch: slice, tokens_NL: Tensor) -> Iterator[None]:
    if outputs is None:
        yield
        return
    with outputs.watching(decoder, batch, tokens_NL.shape[1]):
        yield


@contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: seen.append(main_output(output)))
    try:
        yield seen
    finally:
        handle.remove()
