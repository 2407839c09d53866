"""The fused kernel adds what a loop over samples adds. Without a GPU it runs in Triton's interpreter."""

import os
from collections.abc import Callable

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Read when Triton is imported.
# The interpreters of older ones do not work with numpy 2.4.
triton = pytest.importorskip("triton", minversion="3.7" if DEVICE == "cpu" else None)
if DEVICE == "cpu" and isinstance(triton.language.zeros, triton.JITFunction):
    pytest.skip("Triton was imported before it could be told to interpret", allow_module_level=True)

from barber.runtime.squared_gradients import _add_tile, add_squared_gradients  # noqa: E402

float32 = pytest.param(torch.float32, id="float32")
# The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
bfloat16 = pytest.param(torch.bfloat16, id="bfloat16", marks=on_gpu)
dtypes = pytest.mark.parametrize("dtype", [float32, bfloat16])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, tiny shapes take many tiles, and with one config nothing is tuned."""
    if DEVICE == "cpu":
        monkeypatch.setattr(_add_tile, "configs", [triton.Config({"BLOCK_O": 16, "BLOCK_I": 16, "BLOCK_L": 16})])


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def per_sample(x_BLI: torch.Tensor, gradient_BLO: torch.Tensor) -> torch.Tensor:
    pairs = zip(x_BLI.double(), gradient_BLO.double(), strict=True)
    return torch.stack([(gradient_LO.T @ x_LI).square() for x_LI, gradient_LO in pairs]).sum(dim=0)


def check(sum_OI: torch.Tensor, expected_OI: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Products are exact (bfloat16) or rounded to 24 bits, and summed up in float32: 1e-5 is some hundred roundings.

    It is relative to the largest number too, as a sum in which the tokens cancel has lost digits.
    """
    atol = tolerance * expected_OI.max().item()
    torch.testing.assert_close(sum_OI.double(), expected_OI, rtol=tolerance, atol=atol)


@dtypes
@pytest.mark.parametrize(
    ("samples", "tokens", "inputs", "outputs"),
    [
        pytest.param(1, 32, 16, 32, id="whole-tiles"),
        pytest.param(5, 37, 21, 150, id="ragged"),  # more than eight rows of tiles
        pytest.param(5, 3, 50, 7, id="less-than-a-tile"),
        pytest.param(1, 1, 1, 1, id="one"),
    ],
)
def test_it_adds_the_squared_gradient_of_every_sample(
    samples: int, tokens: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    x, gradient = normal(samples, tokens, inputs, dtype=dtype), normal(samples, tokens, outputs, dtype=dtype, seed=1)
    total = torch.zeros(outputs, inputs, device=DEVICE)
    add_squared_gradients(total, x, gradient, tf32=False)
    check(total, per_sample(x, gradient))


@dtypes
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="tokens-first"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="channels-first"),
        pytest.param(lambda x: torch.cat([x, x + 1], dim=-1)[..., 1 : x.shape[-1] + 1], id="slice-of-channels"),
        pytest.param(lambda x: torch.stack([x, x + 1], dim=-1)[..., 0], id="every-other-channel"),
        pytest.param(lambda x: x[:1].expand_as(x), id="expanded"),
    ],
)
def test_inputs_and_gradients_may_be_views(view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    x, gradient = view(normal(3, 20, 19, dtype=dtype)), view(normal(3, 20, 35, dtype=dtype, seed=1))
    assert not x.is_contiguous() and not gradient.is_contiguous()
    total = torch.zeros(35, 19, device=DEVICE)
    add_squared_gradients(total, x, gradient, tf32=False)
    check(total, per_sample(x, gradient))


@dtypes
def test_what_lies_beyond_a_view_does_not_count(dtype: torch.dtype) -> None:
    """Tiles reach over the edges, where anything may be."""
    x, gradient = (torch.full((4, 24, 24), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2))
    x[1:3, :20, :18], gradient[1:3, :20, :21] = normal(2, 20, 18, dtype=dtype), normal(2, 20, 21, dtype=dtype)
    x, gradient = x[1:3, :20, :18], gradient[1:3, :20, :21]
    total = torch.zeros(21, 18, device=DEVICE)
    add_squared_gradients(total, x, gradient, tf32=False)
    check(total, per_sample(x, gradient))


@dtypes
def test_the_sum_has_the_same_bits_for_any_batch_size(dtype: torch.dtype) -> None:
    x, gradient = normal(5, 40, 19, dtype=dtype), normal(5, 40, 35, dtype=dtype, seed=1)
    whole, parts = torch.ones(35, 19, device=DEVICE), torch.ones(35, 19, device=DEVICE)
    add_squared_gradients(whole, x, gradient, tf32=False)
    for batch in (slice(0, 2), slice(2, 5)):
        add_squared_gradients(parts, x[batch], gradient[batch], tf32=False)
    check(whole, per_sample(x, gradient) + 1)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(
    ("dtype", "tf32", "tolerance"),
    [
        pytest.param(torch.float32, False, 1e-5, id="float32"),
        # Factors keep 11 significant bits, so a product is off by up to 2^-9 and a square by twice that.
        pytest.param(torch.float32, True, 2**-8, id="tf32"),
        pytest.param(torch.bfloat16, False, 1e-5, id="bfloat16", marks=on_gpu),
    ],
)
def test_tuning_adds_nothing(dtype: torch.dtype, tf32: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the kernel runs to find the best config, what was in the sum stays, and samples count once."""
    samples, tokens, inputs, outputs = 5, 333, 520, 1111
    if DEVICE == "cpu":
        samples, tokens, inputs, outputs = 2, 21, 19, 35
        monkeypatch.setattr(
            _add_tile, "configs", [*_add_tile.configs, triton.Config({"BLOCK_O": 32, "BLOCK_I": 16, "BLOCK_L": 16})]
        )
        monkeypatch.setitem(
            vars(_add_tile), "do_bench", lambda run, quantiles: [run() or run() or 1.0 for _ in quantiles]
        )
    x, gradient = normal(samples, tokens, inputs, dtype=dtype), normal(samples, tokens, outputs, dtype=dtype, seed=1)
    total = torch.full((outputs, inputs), 100.0, device=DEVICE)
    for calls in (1, 2):
        add_squared_gradients(total, x, gradient, tf32=tf32)
        check(total, 100 + calls * per_sample(x, gradient), tolerance)
