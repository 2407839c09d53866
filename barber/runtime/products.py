"""The matrix products that take nearly all of the time, by the fastest way that is there."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from barber.runtime.tensors import Tensor, replaced_forward


@contextmanager
def fast_linears(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Let float32 linears on a CPU compute by oneDNN inside this context.

    torch takes MKL for them, which leaves a third of what AMD's AVX-512 units could do; where both are at home they
    are equally fast. Everything else is left to torch.
    """
    with ExitStack() as stack:
        if device.type == "cpu" and _onednn() is not None:
            for module in modules:
                if isinstance(module, nn.Linear):
                    stack.enter_context(replaced_forward(module, partial(_linear, module)))
        yield


def add_squared_gradients(sum_OI: Tensor, x_BLI: Tensor, gradient_BLO: Tensor) -> None:
    """sum += sum over samples of (gradient^T x)^2, the product summed over the tokens of one sample; in place.

    Args:
        sum_OI: float32.
        x_BLI: inputs of a linear.
        gradient_BLO: gradients by its outputs, in the dtype of the inputs.
    """
    if _has_tensor_cores(sum_OI.device) and x_BLI.dtype in (torch.float32, torch.bfloat16):
        from barber.runtime.squared_gradients import add_squared_gradients as fused

        fused(sum_OI, x_BLI, gradient_BLO, tf32=torch.get_float32_matmul_precision() != "highest")
        return
    # One sample at a time into one buffer, which so stays in the cache; the loop is nothing beside the products.
    buffer_OI = torch.empty_like(sum_OI, dtype=x_BLI.dtype)
    for x_LI, gradient_LO in zip(x_BLI, gradient_BLO, strict=True):
        product_OI = torch.mm(gradient_LO.T, x_LI, out=buffer_OI).to(sum_OI.dtype)
        sum_OI.addcmul_(product_OI, product_OI)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    if module.weight.dtype != torch.float32 or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, module.weight, module.bias)
    if torch.is_grad_enabled() and x.requires_grad:
        # Detached: the module may have another weight when the backward pass runs.
        y: Tensor = _Product.apply(x, module.weight.detach(), module.bias)  # type: ignore[no-untyped-call]
        return y
    return _product(x, module.weight, module.bias)


class _Product(torch.autograd.Function):
    """A linear that is differentiated by its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return _product(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        return _product(gradient, weight_OI.T, None), None, None


def _product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    linear = _onednn()
    assert linear is not None
    y: Tensor = linear(x, weight_OI, bias_O, "none", [], "")
    return y


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether the fused kernel runs there: NVIDIA's GPUs since Ampere, where Triton is installed."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _onednn() -> Callable[..., Any] | None:
    """oneDNN's linear as torch's compiler uses it; None where this build of torch has none."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    linear: Callable[..., Any] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return linear
