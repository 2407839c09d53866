"""Looking at what linears are fed and what they give while a model runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from barber.runtime.tensors import Tensor


class Accumulator(Protocol):
    """Something that takes in the inputs of a linear."""

    def add(self, x_TI: Tensor) -> None:
        """Take in those of any number of tokens."""
        ...


S = TypeVar("S", bound=Accumulator)


class AllFed(Exception):  # noqa: N818 (it is no error)
    """Every linear has been given its input: what the model would do from here on is not needed."""


@contextmanager
def observing_inputs(
    linears: Mapping[str, nn.Module], statistic: Callable[[], S], stop: bool = False
) -> Iterator[dict[str, S]]:
    """Collect a statistic of every linear's inputs while the model runs inside this context.

    Linears that are fed the very same tensor (q, k and v; gate and up) share one statistic: it is computed once.
    With `stop` the model is interrupted by `AllFed` as soon as nothing is left to see.
    """
    statistics: dict[str, S] = {}
    last: tuple[Tensor, S] | None = None
    fed: set[str] = set()

    def observe(name: str, x: Tensor) -> None:
        nonlocal last
        if last is not None and last[0] is x:
            statistics.setdefault(name, last[1])
        else:
            if name not in statistics:
                statistics[name] = statistic()
            statistics[name].add(x.detach().flatten(0, -2))
            last = (x, statistics[name])
        fed.add(name)
        if len(fed) == len(linears):
            fed.clear()
            if stop:
                raise AllFed

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
        for name, module in linears.items()
    ]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capturing_inputs(linears: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Run a model inside this context as far as these linears, and have what each is fed: (T, I), in their order."""
    fed: dict[int, Tensor] = {}
    found: list[Tensor] = []

    def capture(number: int, x: Tensor) -> None:
        fed[number] = x.detach().flatten(0, -2)
        if len(fed) == len(linears):
            found.extend(fed[number] for number in range(len(linears)))
            raise AllFed

    handles = [
        module.register_forward_pre_hook(lambda _, args, number=number: capture(number, args[0]))
        for number, module in enumerate(linears)
    ]
    try:
        with suppress(AllFed):
            yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Observed:
    """What a linear was fed and what it gave.

    Args:
        edge: what autograd takes the gradient by the output with, where it is on: the model may have changed the output
            in place since (OLMo clips queries, keys and values), and the gradient is by what the linear gave.
    """

    x: Tensor
    y: Tensor
    edge: GradientEdge | None = None


@contextmanager
def observing_outputs(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Observed]]:
    """Note the input and output of every linear while a block runs inside this context.

    With autograd on, the outputs can be differentiated by: the graph begins at the first linears' outputs, so neither
    gradients of weights (they are had per sample from outputs' gradients) nor of the block's input are computed.
    """
    observed: dict[str, Observed] = {}

    def observe(name: str, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x, edge = args[0].detach(), None
        if torch.is_grad_enabled():
            y = _Begin.apply(y, torch.empty(0, requires_grad=True))  # type: ignore[no-untyped-call]
            edge = get_gradient_edge(y)
        observed[name] = Observed(x, y, edge)
        return y

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: observe(name, args, output))
        for name, module in linears.items()
    ]
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()


class _Begin(torch.autograd.Function):
    """The same tensor, where a graph goes on or begins; unlike a leaf or a view it may be changed in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, _: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
