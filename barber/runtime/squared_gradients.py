"""A fused kernel for v += sum over samples of G^2, with G = gradient_LO^T x_LI the gradient of one sample's loss.

No G is ever written to memory. Each program owns a tile of v: it loops over the samples, sums the tile of G up over a
sample's tokens in float32 registers, squares it and adds it to the tile of v, which is read once and written once.

Importing this module needs Triton, and calling it a CUDA device; callers check for both.
"""

import torch
import triton
import triton.language as tl

from barber.runtime.tensors import Tensor

# A thread keeps its share of two tiles, of G and of v, in registers. It has 255, and tiles of 128 x 128 shared by 8
# warps take 128 of them: larger ones would not fit. Multiplying in plain float32 wants a short BLOCK_L.
_CONFIGS = [
    triton.Config({"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_L": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_L": 32}, num_warps=8, num_stages=4),
    triton.Config({"BLOCK_O": 128, "BLOCK_I": 64, "BLOCK_L": 32}, num_warps=4, num_stages=4),
    triton.Config({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_L": 32}, num_warps=4, num_stages=4),
]


# Tuning runs the kernel many times and every run adds to the sum, so that has to be put back.
@triton.autotune(_CONFIGS, key=["tokens", "inputs", "outputs", "PRECISION"], restore_value=["sum_OI"])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def _add_tile(  # type: ignore[no-untyped-def]
    sum_OI,
    x_BLI,
    gradient_BLO,
    samples,
    tokens,
    inputs,
    outputs,
    x_stride_B,
    x_stride_L,
    x_stride_I,
    gradient_stride_B,
    gradient_stride_L,
    gradient_stride_O,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    # Programs of the same time share their inputs in the L2 cache: go down eight rows of tiles before the next column.
    tile_O, tile_I = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8)
    # int64, and so are all offsets: more than 2^31 numbers may lie behind a pointer.
    output_O = tile_O.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    input_I = tile_I.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    token_L = tl.arange(0, BLOCK_L).to(tl.int64)
    inside_O, inside_I = output_O < outputs, input_I < inputs
    tile_OI = sum_OI + output_O[:, None] * inputs + input_I[None, :]
    inside_OI = inside_O[:, None] & inside_I[None, :]
    # Beginning with the sum itself, samples are added in the same order however they were batched.
    total_OI = tl.load(tile_OI, mask=inside_OI, other=0.0)
    for _ in range(samples):
        weight_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for start in range(0, tokens, BLOCK_L):
            now_L = start + token_L
            inside_L = now_L < tokens
            x_LI = tl.load(
                x_BLI + now_L[:, None] * x_stride_L + input_I[None, :] * x_stride_I,
                mask=inside_L[:, None] & inside_I[None, :],
                other=0.0,
            )
            gradient_OL = tl.load(
                gradient_BLO + output_O[:, None] * gradient_stride_O + now_L[None, :] * gradient_stride_L,
                mask=inside_O[:, None] & inside_L[None, :],
                other=0.0,
            )
            weight_OI = tl.dot(gradient_OL, x_LI, acc=weight_OI, input_precision=PRECISION)
        total_OI += weight_OI * weight_OI
        x_BLI += x_stride_B
        gradient_BLO += gradient_stride_B
    tl.store(tile_OI, total_OI, mask=inside_OI)


def add_squared_gradients(sum_OI: Tensor, x_BLI: Tensor, gradient_BLO: Tensor, *, tf32: bool) -> None:
    """Add every sample's squared gradient of the weight to `sum_OI`, in place.

    Args:
        sum_OI: float32, contiguous.
        x_BLI: The linear's inputs, bfloat16 or float32, of any strides.
        gradient_BLO: The gradients of its outputs, in the dtype of x, of any strides.
        tf32: Whether float32 is multiplied as TensorFloat32, with 10 bits behind the point. Products of bfloat16 are
            exact either way.
    """
    samples, tokens, inputs = x_BLI.shape
    outputs = gradient_BLO.shape[-1]
    assert gradient_BLO.shape == (samples, tokens, outputs) and sum_OI.shape == (outputs, inputs)
    assert x_BLI.dtype == gradient_BLO.dtype and x_BLI.dtype in (torch.bfloat16, torch.float32)
    assert sum_OI.dtype == torch.float32 and sum_OI.is_contiguous()

    def grid(blocks: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(inputs, blocks["BLOCK_I"]), triton.cdiv(outputs, blocks["BLOCK_O"])

    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device(sum_OI.get_device()):
        _add_tile[grid](
            sum_OI,
            x_BLI,
            gradient_BLO,
            samples,
            tokens,
            inputs,
            outputs,
            *x_BLI.stride(),
            *gradient_BLO.stride(),
            PRECISION="tf32" if tf32 else "ieee",
        )
