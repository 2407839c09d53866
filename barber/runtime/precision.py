"""In which precision matrix products are computed; everything that is added up stays float32 or better."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from barber.errors import UserError

Choice = Literal["auto", "float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class Arithmetic:
    """How the matrix products of a pass are computed on a device.

    Args:
        kind: `float32` in full; `tf32`: float32 numbers of which a GPU's tensor cores use 10 bits of mantissa;
            `bfloat16` numbers, 8 bits. Products are added up in float32 in all three.
    """

    kind: Literal["float32", "tf32", "bfloat16"]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights of linears and of what they give."""
        return torch.bfloat16 if self.kind == "bfloat16" else torch.float32

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Compute so inside this context."""
        if self.kind == "bfloat16":
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                yield
        elif self.device.type == "cuda":
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if self.kind == "tf32" else "highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
        else:
            yield


@dataclass(frozen=True)
class Precision:
    """The precision of forward passes and of gradients.

    Args:
        forward: of the passes that statistics, sparse outputs and the next layer's inputs come from.
        gradient: of a block's dense pass that is differentiated, of its backward pass, and of the products of inputs
            and output gradients.

    `auto` is float32 on a CPU and bfloat16 on a GPU that computes in it.
    """

    forward: Choice = "auto"
    gradient: Choice = "auto"

    def check(self, device: torch.device) -> None:
        """Refuse what the device cannot do.

        Raises:
            UserError: tf32 without a GPU.
        """
        for field in ("forward", "gradient"):
            if getattr(self, field) == "tf32" and device.type != "cuda":
                raise UserError(f"must be float32 or bfloat16 on {device}: tf32 is for GPUs", field=field)

    def on(self, device: torch.device) -> tuple[Arithmetic, Arithmetic]:
        """The arithmetic of forward passes and of gradients."""
        self.check(device)
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        default: Literal["float32", "bfloat16"] = "bfloat16" if has_bfloat16 else "float32"
        forward = default if self.forward == "auto" else self.forward
        gradient = default if self.gradient == "auto" else self.gradient
        return Arithmetic(forward, device), Arithmetic(gradient, device)
