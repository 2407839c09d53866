"""The decoder layers of a causal language model, and what the model feeds them."""

from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from barber.model.blocks import Block, Call, Layer, Linear
from barber.model.families import Family, family_of
from barber.runtime.activations import Activations, ActivationStore
from barber.runtime.tensors import Tensor, batches, converted, replaced_forward


@dataclass(frozen=True)
class LayerInputs:
    """What the first decoder layer is fed, and the other arguments of every layer's call.

    Args:
        hidden: the embedded tokens of all samples.
        calls: for every layer, its arguments by batch size; masks and positions differ by layer in some families
            (sliding and full attention) and by batch size in others.
    """

    hidden: Activations
    calls: list[dict[int, Call]]

    def call(self, layer: int, hidden_BLD: Tensor) -> Call:
        """The call of a layer on a batch of hidden states."""
        recorded = self.calls[layer][len(hidden_BLD)]
        return Call(hidden_BLD, recorded.args, recorded.kwargs)


class Decoder:
    """The decoder layers of a model.

    Raises:
        UserError: a model type without a family.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        family = family_of(model.config)
        modules: nn.ModuleList = attrgetter(family.layers)(model)
        self.model = model
        self.layers = [_open(module, f"{family.layers}.{i}", family, model.config) for i, module in enumerate(modules)]

    @property
    def linears(self) -> list[Linear]:
        """Every prunable linear, in the order of the walk."""
        return [linear for layer in self.layers for linear in layer.linears]

    def inputs(
        self,
        tokens_NL: Tensor,
        batch_size: int,
        store: ActivationStore,
        dtype: torch.dtype | None = torch.float32,
        also: tuple[int, ...] = (),
    ) -> LayerInputs:
        """Embed the tokens into the store and record every layer's call, in `dtype` (None: the model's own).

        The model's own forward runs with decoder layers that hand their input on, so this costs no more than the
        embedding. Calls are recorded for the full and the last, smaller batch, and for batches of the sizes `also`.
        """
        calls: list[dict[int, Call]] = [{} for _ in self.layers]
        hidden: Activations | None = None
        for batch in batches(len(tokens_NL), batch_size):
            seen = self._embed(tokens_NL[batch])
            embedded_BLD = seen[0].x
            if hidden is None:
                hidden = store.empty(len(tokens_NL), *embedded_BLD.shape[1:])
            hidden[batch] = embedded_BLD
            for by_size, call in zip(calls, seen, strict=True):
                by_size.setdefault(len(embedded_BLD), call)
        for size in also:
            for by_size, call in zip(calls, self._embed(tokens_NL[:size]), strict=True):
                by_size.setdefault(size, call)
        assert hidden is not None
        device = store.device
        moved: dict[int, Any] = {}  # masks and positions are shared between layers: one copy each
        for by_size in calls:
            for size, call in by_size.items():
                kwargs = {}
                for key, value in call.kwargs.items():
                    if id(value) not in moved:
                        moved[id(value)] = (converted(value, device, dtype), value)
                    kwargs[key] = moved[id(value)][0]
                by_size[size] = Call(call.x.new_empty(0), converted(call.args, device, dtype), kwargs)
        return LayerInputs(hidden, calls)

    @torch.no_grad()
    def logits(self, tokens_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        """The logits of a batch whose last decoder layer gave `hidden_BLD`: (B, L, V).

        What follows the layers (norm, head, scaling, capping) is left to the model's own forward.
        """

        def pass_on(*args: Any, **kwargs: Any) -> Tensor:
            return Call.of(args, kwargs).x

        with ExitStack() as stack:
            for layer in self.layers[:-1]:
                stack.enter_context(replaced_forward(layer.module, pass_on))
            stack.enter_context(replaced_forward(self.layers[-1].module, lambda *_, **__: hidden_BLD))
            logits_BLV = self.model(input_ids=tokens_BL, use_cache=False).logits
        assert isinstance(logits_BLV, Tensor)
        return logits_BLV

    @torch.no_grad()
    def _embed(self, tokens_BL: Tensor) -> list[Call]:
        """The call of every layer on a batch, with the hidden state of the first in all of them."""
        seen: list[Call] = []

        def note(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(Call.of(args, kwargs))
            return seen[-1].x

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(replaced_forward(layer.module, note))
            device = self.model.get_input_embeddings().weight.device
            self.model.base_model(input_ids=tokens_BL.to(device), use_cache=False)
        return seen


def _open(layer: nn.Module, name: str, family: Family, config: PreTrainedConfig) -> Layer:
    """A layer, cut open at those of its family's blocks that it has."""
    inside = dict(layer.named_modules(remove_duplicate=False))
    heads, norms = family.heads_of(config), family.norms_of(config)
    blocks: list[Block] = []
    for block_name, chain in family.blocks.items():
        if not all(path in inside for path in chain):
            continue
        block = Block(block_name, [inside[path] for path in chain], [], heads)
        if block_name in norms:
            block.norm = inside.get(norms[block_name], blocks[-1].norm if blocks else None)
        modules = {path: module for root in chain for path, module in inside[root].named_modules(prefix=root)}
        for path, module in modules.items():
            roles = family.roles_of(path)
            if isinstance(module, nn.Linear | Conv1D) and family.is_pruned(path):
                block.linears.append(Linear(f"{name}.{path}", module, roles, path in family.interleaved))
            else:
                block.others.update(dict.fromkeys(roles, module))
        blocks.append(block)
    return Layer(name, layer, blocks)
