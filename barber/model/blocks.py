"""A decoder layer cut open at its residual branches, the blocks: nearly always self-attention and MLP.

A block can be run by itself on captured inputs, with dense or sparse weights and with gradients. What lies around the
blocks (norms, residuals, their order) is left to the layer's own forward: it runs with the blocks' modules answering
from outputs that are known already, which costs next to nothing and holds for every family.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from barber.model.families import Heads, Role
from barber.runtime.offload import Offload
from barber.runtime.precision import Arithmetic
from barber.runtime.products import fast_linears
from barber.runtime.tensors import Tensor, converted, replaced_forward


@dataclass(frozen=True)
class Linear:
    """A prunable linear: nn.Linear, or GPT-2's Conv1D, whose weight is stored transposed.

    Args:
        roles: what it is for, in the order of its rows; more than one if it is fused, none if nothing is known of it.
        interleaved: whether the rows of its roles take turns; `barber.model.roles.part` tells them apart.
    """

    name: str
    module: nn.Linear | Conv1D
    roles: tuple[Role, ...] = ()
    interleaved: bool = False

    @property
    def weight_OI(self) -> Tensor:
        """The weight, a view of the module's own."""
        return self.turned(self.module.weight.data)

    def turned(self, weight: Tensor) -> Tensor:
        """A weight as it is stored, as a view (O, I); and the other way round."""
        return weight.T if isinstance(self.module, Conv1D) else weight


@contextmanager
def using(linears: Sequence[Linear], weight_OI: Mapping[str, Tensor], arithmetic: Arithmetic) -> Iterator[None]:
    """Let linears have these weights, by name, and compute as the arithmetic has it; what they had before is put back.

    Nothing is copied unless the arithmetic's dtype is another. A backward pass reads the weights that are there when it
    runs, so it belongs inside.
    """
    before = [linear.module.weight.data for linear in linears]
    try:
        for linear in linears:
            linear.module.weight.data = linear.turned(weight_OI[linear.name].to(arithmetic.dtype))
        with arithmetic():
            yield
    finally:
        for linear, weight in zip(linears, before, strict=True):
            linear.module.weight.data = weight


@dataclass(frozen=True)
class Call:
    """The arguments of a module's call; `x` is the hidden state, whether it came by position or by name."""

    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        if args:
            return cls(args[0], args[1:], kwargs)
        return cls(kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"})

    def on(self, module: nn.Module) -> Any:
        return module(self.x, *self.args, **self.kwargs)


@dataclass
class Block:
    """One residual branch of a decoder layer: a chain of modules, nearly always a chain of one.

    Args:
        linears: those that may be pruned.
        heads: of the model's attention.
        norm: its output is all that the block is fed, and feeds nothing but blocks; parallel blocks have one together.
        others: by role, modules that are no prunable linears: router, experts.
    """

    name: str
    modules: list[nn.Module]
    linears: list[Linear]
    heads: Heads
    norm: nn.Module | None = None
    others: dict[Role, nn.Module] = field(default_factory=dict)
    # How many more values the last module returns beside the output (attention weights), once it has run.
    _extras: int | None = field(default=None, repr=False)
    # Whether it returns the tokens of all samples in one row (OPT's MLP).
    _flat: bool = field(default=False, repr=False)

    def using(self, weight_OI: Mapping[str, Tensor], arithmetic: Arithmetic) -> AbstractContextManager[None]:
        """The block with these weights and this arithmetic, see `using`."""
        return using(self.linears, weight_OI, arithmetic)

    def run(self, call: Call) -> Tensor:
        """The block's output on captured inputs, with the weights its linears have now."""
        y = call.on(self.modules[0])
        for module in self.modules[1:]:
            y = module(y)
        return main_output(y)

    @contextmanager
    def recorded(self) -> Iterator[dict[str, Any]]:
        """While the layer runs, note the block's call and its output; the layer is interrupted by `Reached` then."""
        record: dict[str, Any] = {}

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record["call"] = Call.of(args, kwargs)

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            record["output"] = main_output(output)
            self._extras = len(output) - 1 if isinstance(output, tuple) else None
            self._flat = record["output"].ndim == 2
            raise Reached

        entry = self.modules[0].register_forward_pre_hook(enter, with_kwargs=True)
        exit_ = self.modules[-1].register_forward_hook(leave)
        try:
            yield record
        finally:
            entry.remove()
            exit_.remove()

    @contextmanager
    def answering(self, output_BLD: Tensor) -> Iterator[None]:
        """While the layer runs, don't compute the block: answer an output that it has given before."""
        output = output_BLD.flatten(0, -2) if self._flat else output_BLD

        def pass_on(*args: Any, **kwargs: Any) -> Tensor:
            return Call.of(args, kwargs).x

        def answer(*args: Any, **kwargs: Any) -> Any:
            return output if self._extras is None else (output, *[None] * self._extras)

        with ExitStack() as stack:
            for module in self.modules[:-1]:
                stack.enter_context(replaced_forward(module, pass_on))
            stack.enter_context(replaced_forward(self.modules[-1], answer))
            yield


class Reached(Exception):  # noqa: N818 (it is no error)
    """A block has given its output: what the layer would do with it is not needed."""


@dataclass
class Layer:
    """A decoder layer and its blocks, in the order in which the layer runs them."""

    name: str
    module: nn.Module
    blocks: list[Block]

    @property
    def linears(self) -> list[Linear]:
        return [linear for block in self.blocks for linear in block.linears]

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]

    def using(self, weight_OI: Mapping[str, Tensor], arithmetic: Arithmetic) -> AbstractContextManager[None]:
        """The layer with these weights and this arithmetic, see `using`."""
        return using(self.linears, weight_OI, arithmetic)

    def keep(self, weight_OI: Mapping[str, Tensor]) -> None:
        """Let the linears have these weights, by name and in float32, from now on."""
        for linear in self.linears:
            linear.module.weight.data = linear.turned(weight_OI[linear.name])

    def run(self, call: Call) -> Tensor:
        """The layer's output."""
        return main_output(call.on(self.module))

    def run_block(self, index: int, call: Call, done: list[Tensor]) -> tuple[Call, Tensor]:
        """Run the layer as far as block `index`, given the outputs of the blocks before it.

        Returns the block's call and its output with the present weights.
        """
        with ExitStack() as stack:
            for block, output in zip(self.blocks[:index], done, strict=True):
                stack.enter_context(block.answering(output))
            record = stack.enter_context(self.blocks[index].recorded())
            stack.enter_context(suppress(Reached))
            self.run(call)
        return record["call"], record["output"]

    def finish(self, call: Call, done: list[Tensor]) -> Tensor:
        """The layer's output, given the outputs of all its blocks."""
        with ExitStack() as stack:
            for block, output in zip(self.blocks, done, strict=True):
                stack.enter_context(block.answering(output))
            return self.run(call)

    @contextmanager
    def onloaded(self, device: torch.device, offload: Offload | None = None) -> Iterator[None]:
        """The layer on `device` in float32, without autograd for its weights and with fast products.

        On the way out the linears' weights are stored where they came from, in the model's dtype, and all else is put
        back as it was; after an error the layer is left untouched.
        """
        tensors = self.tensors
        stored = [tensor.data for tensor in tensors]
        wanted_gradient = [tensor.requires_grad for tensor in tensors]
        weights = {id(linear.module.weight) for linear in self.linears}
        try:
            fetched = offload.take(id(self), stored) if offload else [converted(value, device) for value in stored]
            for tensor, value in zip(tensors, fetched, strict=True):
                tensor.requires_grad_(False)
                tensor.data = value
            with fast_linears([linear.module for linear in self.linears], device):
                yield
            for tensor, original in zip(tensors, stored, strict=True):
                if id(tensor) in weights and tensor.data is not original:
                    if offload is not None:
                        offload.put(original, tensor.data)
                    else:
                        original.copy_(tensor.data)
        finally:
            for tensor, original, wanted in zip(tensors, stored, wanted_gradient, strict=True):
                tensor.data = original
                tensor.requires_grad_(wanted)


def main_output(output: Any) -> Tensor:
    """What a module returned first; attention weights and the like may follow."""
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first
