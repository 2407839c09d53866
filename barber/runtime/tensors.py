"""Shape legend. A tensor's name ends in its shape, one capital letter an axis (`x_BLD`, `weight_OI`).

    N  samples of the calibration set      B  samples of a batch
    L  tokens of a sample                  D  hidden size
    I  inputs of a linear                  O  outputs of a linear
    G  groups of competing weights         M  members of a group
    C  cells of an N:M pattern (with M members each)
    V  vocabulary                          T  tokens of a text

Masks are `pruned_*`: bool, True where the weight is zeroed. Scores are float32; a higher score is more worth keeping.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Tensor",
    "as_bytes",
    "batches",
    "by_sample",
    "converted",
    "digest_of_tensors",
    "in_float32",
    "moved",
    "replaced_forward",
]


def batches(num_samples: int, batch_size: int) -> Iterator[slice]:
    """Slices of at most `batch_size` samples that cover `num_samples` in order."""
    for start in range(0, num_samples, batch_size):
        yield slice(start, min(start + batch_size, num_samples))


def converted(value: Any, device: torch.device, dtype: torch.dtype | None = torch.float32) -> Any:
    """`value` with every tensor in it (nested in tuples, lists, dicts) on `device`, floating ones in `dtype`.

    With dtype None they keep their own.
    """
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(converted(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: converted(item, device, dtype) for key, item in value.items()}
    return value


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module answer with another forward inside this context."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def moved(tensors: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Parameters and buffers on a device inside this context; where they are at home they stay as they are."""
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


@contextmanager
def in_float32(tensors: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Parameters and buffers on a device and in float32 inside this context, without gradients for them."""
    homes = [tensor.data for tensor in tensors]
    wanted_gradient = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.requires_grad_(False)
            tensor.data = converted(home, device)
        yield
    finally:
        for tensor, home, wanted in zip(tensors, homes, wanted_gradient, strict=True):
            tensor.data = home
            tensor.requires_grad_(wanted)


def by_sample(x: Tensor, num_samples: int) -> Tensor:
    """(B, L, channels) from that or from (B * L, channels)."""
    return x.reshape(num_samples, -1, x.shape[-1])


def as_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a contiguous tensor on the CPU, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors, whatever their order."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(as_bytes(tensor.detach().cpu().contiguous()))
    return found.hexdigest()
