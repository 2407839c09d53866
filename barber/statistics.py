"""What a pass over the calibration set leaves behind: sums over samples, accumulated in place, batch by batch.

Every statistic is a mean over samples of a per-sample quantity, so the batch size changes nothing but the order of
float32 additions. Inputs are (B, L, I), output gradients (B, L, O), float32.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from barber.tensors import Tensor


class InputStatistic(Protocol):
    """A sum over all tokens of all samples that a linear is fed, divided by the number of samples."""

    def __init__(self, num_samples: int) -> None: ...

    def add(self, x_TI: Tensor) -> None:
        """Take in the inputs of any number of tokens."""
        ...

    def value(self) -> Tensor:
        """The mean over samples."""
        ...


class SecondMoment:
    """m_i = mean over samples of the sum over tokens of x_i^2: (I,), float32 (Wanda, arXiv 2306.11695, section 3)."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._sum_I: Tensor | float = 0.0

    def add(self, x_TI: Tensor) -> None:
        # In float64, so that the result does not depend on how the samples were batched.
        self._sum_I = self._sum_I + x_TI.square().sum(dim=0, dtype=torch.float64)

    def value(self) -> Tensor:
        assert isinstance(self._sum_I, Tensor)
        return (self._sum_I / self._num_samples).float()


class Hessian:
    """H = mean over samples of 2 x x^T, summed over tokens: (I, I), float32 (SparseGPT, arXiv 2301.00774, eq. 3)."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._sum_II: Tensor | None = None

    def add(self, x_TI: Tensor) -> None:
        if self._sum_II is None:
            self._sum_II = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
        self._sum_II.addmm_(x_TI.T, x_TI)

    def value(self) -> Tensor:
        assert self._sum_II is not None
        return self._sum_II * (2 / self._num_samples)


class MeanSquaredGradient:
    """v = mean over samples of G^2, with G the gradient of one sample's loss by the weight: (O, I), float32.

    G = gradient^T x, summed over the tokens of one sample; it is squared before samples are added up, so samples are
    multiplied out one at a time into the same buffer, which also keeps it in the cache.
    """

    def __init__(self) -> None:
        self._sum_OI: Tensor | None = None
        self._buffer_OI: Tensor | None = None
        self._num_samples = 0

    def add(self, x_BLI: Tensor, gradient_BLO: Tensor) -> None:
        if self._sum_OI is None or self._buffer_OI is None:
            self._sum_OI = x_BLI.new_zeros(gradient_BLO.shape[-1], x_BLI.shape[-1])
            self._buffer_OI = torch.empty_like(self._sum_OI)
        for x_LI, gradient_LO in zip(x_BLI, gradient_BLO, strict=True):
            torch.mm(gradient_LO.T, x_LI, out=self._buffer_OI)
            self._sum_OI.addcmul_(self._buffer_OI, self._buffer_OI)
        self._num_samples += len(x_BLI)

    def value(self) -> Tensor:
        assert self._sum_OI is not None
        return self._sum_OI / self._num_samples


@contextmanager
def observing_inputs(
    linears: Mapping[str, nn.Module], statistic: Callable[[], InputStatistic]
) -> Iterator[dict[str, InputStatistic]]:
    """Collect a statistic of every linear's inputs while the model runs inside this context.

    Linears that are fed the very same tensor (q, k and v; gate and up) share one statistic: it is computed once.
    """
    statistics: dict[str, InputStatistic] = {}
    last: tuple[Tensor, InputStatistic] | None = None

    def observe(name: str, x: Tensor) -> None:
        nonlocal last
        if last is not None and last[0] is x:
            statistics.setdefault(name, last[1])
            return
        if name not in statistics:
            statistics[name] = statistic()
        statistics[name].add(x.flatten(0, -2))
        last = (x, statistics[name])

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
def observing_outputs(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Note the input and output of every linear while a block runs inside this context.

    With autograd on, the outputs can be differentiated by: the graph begins at the first linears' outputs, so neither
    gradients of weights (they are had per sample from outputs' gradients) nor of the block's input are computed.
    """
    observed: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        observed[name] = (args[0].detach(), output)

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: observe(name, args, output))
        for name, module in linears.items()
    ]
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()
