"""What a pass over the calibration set leaves behind: sums over samples, accumulated in place, batch by batch.

Every statistic is a mean over samples of a per-sample quantity, so the batch size changes nothing but the order of
float32 additions, and so does the number of processes that share the samples. Inputs are (B, L, I), output gradients
(B, L, O); whatever their dtype, sums are float32 or better.
"""

from typing import Protocol

import torch

from barber.runtime.distributed import ALONE, Ranks
from barber.runtime.products import add_squared_gradients
from barber.runtime.tensors import Tensor


class InputStatistic(Protocol):
    """A sum over all tokens of all samples that a linear is fed, divided by the number of samples."""

    def __init__(self, num_samples: int) -> None: ...

    def add(self, x_TI: Tensor) -> None:
        """Take in the inputs of any number of tokens."""
        ...

    def value(self, ranks: Ranks = ALONE) -> Tensor:
        """The mean over the samples of all processes."""
        ...


class SecondMoment:
    """m_i = mean over samples of the sum over tokens of x_i^2: (I,), float32 (Wanda, arXiv 2306.11695, section 3)."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._sum_I: Tensor | float = 0.0

    def add(self, x_TI: Tensor) -> None:
        # In float64, so that the result does not depend on how the samples were batched.
        self._sum_I = self._sum_I + x_TI.float().square().sum(dim=0, dtype=torch.float64)

    def value(self, ranks: Ranks = ALONE) -> Tensor:
        assert isinstance(self._sum_I, Tensor)
        return (ranks.all_reduce_sum(self._sum_I) / self._num_samples).float()


class Moments:
    """What DSnoT knows of every input x_i: (3, I), float32 (arXiv 2310.08915, section 3.2).

    The rows: mean over samples of the sum over tokens of x_i; variance of x_i over all tokens; mean over samples of the
    sum over tokens of x_i^2.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._sums_3I: Tensor | None = None

    def add(self, x_TI: Tensor) -> None:
        # In float64, the squares too: a variance is a small difference where an input hardly changes.
        x_TI = x_TI.double()
        tokens_I = x_TI.new_full((x_TI.shape[1],), len(x_TI))
        sums_3I = torch.stack([x_TI.sum(dim=0), x_TI.square().sum(dim=0), tokens_I])
        self._sums_3I = sums_3I if self._sums_3I is None else self._sums_3I + sums_3I

    def value(self, ranks: Ranks = ALONE) -> Tensor:
        assert self._sums_3I is not None
        sum_I, squares_I, tokens_I = ranks.all_reduce_sum(self._sums_3I)
        variance_I = squares_I / tokens_I - (sum_I / tokens_I).square()
        means_3I = [sum_I / self._num_samples, variance_I.clamp(min=0), squares_I / self._num_samples]
        return torch.stack(means_3I).float()


class Hessian:
    """H = mean over samples of 2 x x^T, summed over tokens: (I, I), float32 (SparseGPT, arXiv 2301.00774, eq. 3)."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._sum_II: Tensor | None = None

    def add(self, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        if self._sum_II is None:
            self._sum_II = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
        with torch.autocast(x_TI.device.type, enabled=False):
            self._sum_II.addmm_(x_TI.T, x_TI)

    def value(self, ranks: Ranks = ALONE) -> Tensor:
        assert self._sum_II is not None
        return ranks.all_reduce_sum(self._sum_II) * (2 / self._num_samples)


class CrossMoment:
    """mean over samples of 2 a x^T, summed over tokens: (J, I), float32, at the scale of `Hessian`."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._sum_JI: Tensor | None = None

    def add(self, a_TJ: Tensor, x_TI: Tensor) -> None:
        """Take in any number of tokens."""
        if self._sum_JI is None:
            self._sum_JI = torch.zeros(a_TJ.shape[1], x_TI.shape[1], device=x_TI.device)
        with torch.autocast(x_TI.device.type, enabled=False):
            self._sum_JI.addmm_(a_TJ.float().T, x_TI.float())

    def value(self, ranks: Ranks = ALONE) -> Tensor:
        """The mean over the samples of all processes."""
        assert self._sum_JI is not None
        return ranks.all_reduce_sum(self._sum_JI) * (2 / self._num_samples)


class MeanSquaredGradient:
    """v = mean over samples of G^2, with G the gradient of one sample's loss by the weight: (O, I), float32.

    G = gradient^T x, summed over the tokens of one sample, and squared before samples are added up.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._sum_OI: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added."""
        return self._sum_OI is None

    def add(self, x_BLI: Tensor, gradient_BLO: Tensor) -> None:
        """Take in a batch of samples, the inputs of a linear and the gradients by its outputs."""
        if self._sum_OI is None:
            shape = (gradient_BLO.shape[-1], x_BLI.shape[-1])
            self._sum_OI = torch.zeros(shape, dtype=torch.float32, device=x_BLI.device)
        add_squared_gradients(self._sum_OI, x_BLI, gradient_BLO)

    def value(self, ranks: Ranks = ALONE) -> Tensor:
        """The mean over the samples of all processes."""
        assert self._sum_OI is not None
        return ranks.all_reduce_sum(self._sum_OI) / self._num_samples
