"""The fast matrix products are torch's to float32's rounding, and nothing is left of them afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from barber import SparseGPT, Wanda
from barber.methods.pruners import Pruner
from barber.model.blocks import Layer
from barber.model.decoder import Decoder
from barber.runtime import products
from barber.runtime.products import add_squared_gradients, fast_linears
from barber.runtime.tensors import batches
from tests import tiny
from tests.pruning import linears, walked

CPU = torch.device("cpu")
INPUTS, OUTPUTS = 48, 40
needs_onednn = pytest.mark.skipif(products._onednn() is None, reason="this torch has no oneDNN")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS, bias, dtype=dtype).requires_grad_(False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often oneDNN was asked: a list that grows."""
    found: list[int] = []
    onednn = products._onednn()
    assert onednn is not None

    def counted(*arguments: Any) -> Any:
        found.append(1)
        return onednn(*arguments)

    monkeypatch.setattr(products, "_onednn", lambda: counted)
    return found


def check(found: torch.Tensor, exact: torch.Tensor) -> None:
    """A sum of some fifty products, each rounded to 24 bits: off by less than fifty roundings of the largest."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=50 * 2**-24 * exact.abs().max().item())


# ---------------------------------------------------------------------------------------------------------------------
# Linears


@needs_onednn
@pytest.mark.parametrize(
    "change_weight",
    [
        pytest.param(lambda weight: weight, id="contiguous"),
        pytest.param(lambda weight: weight.T.contiguous().T, id="transposed"),
        pytest.param(lambda weight: torch.cat([weight, weight], dim=1)[:, :INPUTS], id="slice"),
        pytest.param(lambda weight: weight.masked_fill(weight > 0, 0), id="pruned"),
    ],
)
@pytest.mark.parametrize(
    "change_x",
    [
        pytest.param(lambda x: x, id="3d"),
        pytest.param(lambda x: x.flatten(0, 1), id="2d"),
        pytest.param(lambda x: x[:1, :1], id="one-token"),
        pytest.param(lambda x: x[:0], id="no-sample"),
        pytest.param(lambda x: x[None], id="4d"),
        pytest.param(lambda x: x.transpose(0, 1), id="tokens-first"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="channels-first"),
        pytest.param(lambda x: x[:1].expand_as(x), id="expanded"),
    ],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_outputs_and_gradients_by_inputs_are_torchs(
    bias: bool,
    change_x: Callable[[torch.Tensor], torch.Tensor],
    change_weight: Callable[[torch.Tensor], torch.Tensor],
    calls: list[int],
) -> None:
    module = linear(bias)
    module.weight.data = change_weight(module.weight.data)
    x = change_x(normal(3, 7, INPUTS)).detach()
    gradient = normal(*x.shape[:-1], OUTPUTS, seed=1)
    exact = x.double() @ module.weight.double().T + (module.bias.double() if bias else 0)
    with fast_linears([module], CPU):
        plain = module(x)
        assert len(calls) == 1
        x.requires_grad_()
        y = module(x)
        (found,) = torch.autograd.grad(y, x, gradient)
    assert len(calls) == 3
    assert plain.shape == y.shape == exact.shape
    if exact.numel():
        assert torch.equal(plain, y)
        check(plain, exact)
        check(found, gradient.double() @ module.weight.double())


@needs_onednn
def test_gradients_that_are_views_are_taken_as_they_are(calls: list[int]) -> None:
    """A sum gives one number, expanded; a head's transpose gives its own strides."""
    module, x = linear(), normal(3, 7, INPUTS).requires_grad_()
    with fast_linears([module], CPU):
        (of_sum,) = torch.autograd.grad(module(x).sum(), x)
        (of_transposed,) = torch.autograd.grad(module(x).transpose(1, 2), x, normal(3, OUTPUTS, 7, seed=1))
    check(of_sum, module.weight.double().sum(dim=0).expand_as(x))
    check(of_transposed, normal(3, OUTPUTS, 7, seed=1).mT.double() @ module.weight.double())


@needs_onednn
def test_a_weight_that_is_swapped_under_a_graph_does_not_change_its_gradients(calls: list[int]) -> None:
    """As with torch's own linear; the walk runs blocks with other weights while it keeps a graph."""
    module, x = linear(), normal(3, 7, INPUTS).requires_grad_()
    weight = module.weight.data
    with fast_linears([module], CPU):
        y = module(x)
        module.weight.data = torch.zeros_like(weight)
        (found,) = torch.autograd.grad(y.sum(), x)
    check(found, weight.double().sum(dim=0).expand_as(x))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype, calls: list[int]) -> None:
    module, x = linear(dtype=dtype), normal(2, 5, INPUTS, dtype=dtype)
    with fast_linears([module], CPU):
        assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))
    assert not calls


@needs_onednn
def test_so_is_everything_under_autocast(calls: list[int]) -> None:
    module, x = linear(), normal(2, 5, INPUTS)
    with fast_linears([module], CPU), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert torch.equal(y, nn.functional.linear(x, module.weight, module.bias))
    assert y.dtype == torch.bfloat16
    assert not calls


@needs_onednn
@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_forwards_are_put_back(error: type[BaseException] | None, calls: list[int]) -> None:
    plain, transposed, replaced = linear(), Conv1D(OUTPUTS, INPUTS), linear()
    replaced.forward = answer = lambda x: x  # type: ignore[method-assign]

    def use() -> None:
        with fast_linears([plain, transposed, replaced], CPU):
            assert "forward" in vars(plain) and "forward" not in vars(transposed)
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert "forward" not in vars(plain) and "forward" not in vars(transposed)
    assert vars(replaced)["forward"] is answer
    plain(normal(2, 5, INPUTS))
    assert not calls


@needs_onednn
def test_only_linears_on_a_cpu_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module = linear()
    with fast_linears([module], torch.device("cuda")):
        assert "forward" not in vars(module)
    monkeypatch.setattr(products, "_onednn", lambda: None)
    with fast_linears([module], CPU):
        assert "forward" not in vars(module)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_an_onloaded_layer_leaves_no_forward_behind(family: str) -> None:
    model = tiny.model(family)
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}

    def work(layer: Layer) -> None:
        with layer.onloaded(CPU):
            raise KeyError

    for layer in Decoder(model).layers:
        with layer.onloaded(CPU):
            pass
        with pytest.raises(KeyError):
            work(layer)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == forwards


@needs_onednn
@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda pruner: type(pruner).__name__)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "phi3"])
def test_a_walk_has_the_masks_of_torchs_own_linears(
    family: str, pruner: Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a few scores that are equal but for their last bits: none here, a thousandth of all elsewhere."""
    fast = linears(walked(tiny.model(family), pruner=pruner)[0])
    monkeypatch.setattr(products, "_onednn", lambda: None)
    plain = linears(walked(tiny.model(family), pruner=pruner)[0])
    for kind in ("initial", "final"):
        masks = [(getattr(fast[name], kind).mask_OI, getattr(plain[name], kind).mask_OI) for name in fast]
        differing = sum(int((one != other).sum()) for one, other in masks)
        assert differing <= sum(one.numel() for one, _ in masks) / 1000


# ---------------------------------------------------------------------------------------------------------------------
# Squared gradients

_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def per_sample(x_BLI: torch.Tensor, gradient_BLO: torch.Tensor) -> torch.Tensor:
    pairs = zip(x_BLI.double(), gradient_BLO.double(), strict=True)
    return torch.stack([(gradient_LO.T @ x_LI).square() for x_LI, gradient_LO in pairs]).sum(dim=0)


@_dtypes
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x, id="contiguous"),
        pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="tokens-first"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="channels-first"),
        pytest.param(lambda x: x[:, :, ::2], id="every-other-channel"),
        pytest.param(lambda x: x[:1].expand_as(x), id="expanded"),
    ],
)
def test_the_squared_gradient_of_every_sample_is_added(
    view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    x, gradient = view(normal(5, 19, INPUTS, dtype=dtype)), view(normal(5, 19, OUTPUTS, seed=1, dtype=dtype))
    total = torch.ones(gradient.shape[-1], x.shape[-1])
    add_squared_gradients(total, x, gradient)
    exact = 1 + per_sample(x, gradient)
    # In bfloat16 a sample's gradient is rounded to 8 bits, off by 2^-8 at most, before it is squared.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(total.double(), exact, rtol=tolerance, atol=tolerance / 10 * exact.max().item())


@_dtypes
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_a_sum_has_the_same_bits_for_any_batch_size(batch_size: int, dtype: torch.dtype) -> None:
    x, gradient = normal(5, 19, INPUTS, dtype=dtype), normal(5, 19, OUTPUTS, seed=1, dtype=dtype)
    whole, parts = torch.zeros(OUTPUTS, INPUTS), torch.zeros(OUTPUTS, INPUTS)
    add_squared_gradients(whole, x, gradient)
    for batch in batches(5, batch_size):
        add_squared_gradients(parts, x[batch], gradient[batch])
    assert torch.equal(whole, parts)


@_dtypes
def test_small_squares_are_not_lost_beside_a_large_one(dtype: torch.dtype) -> None:
    """In bfloat16, 256 + 1 is 256."""
    x, total = torch.ones(301, 1, 1, dtype=dtype), torch.zeros(1, 1)
    x[0] = 16
    add_squared_gradients(total, x, torch.ones_like(x))
    assert total.item() == 556


def test_inputs_and_gradients_of_other_numbers_of_samples_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        add_squared_gradients(torch.zeros(OUTPUTS, INPUTS), normal(3, 5, INPUTS), normal(2, 5, OUTPUTS))
