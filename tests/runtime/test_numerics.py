"""NaN and infinity are found by name, and the device is not asked about them more often than has to be."""

import collections
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from barber import NM, Barber, Magnitude, NumericsError, SparseGPT, Unstructured, Wanda
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.runtime.numerics import FiniteChecks
from barber.walk.walk import Schedule
from tests import tiny
from tests.pruning import prune, state_of, walked

BAD = {"NaN": torch.nan, "inf": torch.inf, "-inf": -torch.inf}

bad_values = pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())


def with_one(value: float, shape: tuple[int, ...] = (3, 4), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.zeros(shape, dtype=dtype)
    tensor.view(-1)[-1] = value
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# FiniteChecks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 3, 4)], ids=str)
@bad_values
def test_one_number_that_is_none_is_found(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    checks = FiniteChecks()
    checks.order({"a tensor": with_one(value, shape, dtype)})
    with pytest.raises(NumericsError, match=r"^a tensor is NaN or infinite$"):
        checks.require()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_numbers_are_numbers(dtype: torch.dtype) -> None:
    checks = FiniteChecks()
    info = torch.finfo(dtype)
    checks.order(
        {"extremes": torch.tensor([info.min, info.max, 0, -0.0, info.tiny, info.smallest_normal], dtype=dtype)}
    )
    checks.require()


@bad_values
def test_the_first_that_was_ordered_is_named_whatever_was_found_first(value: float) -> None:
    checks = FiniteChecks()
    checks.order({"good": torch.ones(2), "first": torch.ones(2)})
    checks.order({"second": with_one(value)})
    checks.order({"first": with_one(value)})
    assert checks.first_failed() == "first"


def test_a_name_that_failed_once_has_failed() -> None:
    """The batches of a pass have one name; a good one does not make up for a bad one."""
    checks = FiniteChecks()
    for tensor in (torch.ones(2), with_one(torch.nan), torch.ones(2)):
        checks.order({"the output": tensor})
    assert checks.first_failed() == "the output"


def test_what_was_looked_at_is_done_with() -> None:
    checks = FiniteChecks()
    checks.order({"bad": with_one(torch.nan), "good": torch.ones(2)})
    assert checks.first_failed() == "bad"
    assert checks.first_failed() is None
    checks.require()
    checks.order({"good": torch.ones(2)})
    checks.require()


# ---------------------------------------------------------------------------------------------------------------------
# In the walk


def walk(
    pruner: Pruner,
    schedule: Schedule,
    pattern: Pattern,
    rebuild: Barber | None,
    model: PreTrainedModel | None = None,
    tokens_NL: torch.Tensor | None = None,
) -> None:
    """In batches of two."""
    tokens_NL = tiny.tokens() if tokens_NL is None else tokens_NL
    walked(model or tiny.model(), pattern, pruner, rebuild, tokens_NL=tokens_NL, batch_size=2, schedule=schedule)


_NOT_ON_A_GPU = ("_embed", "_kth_lowest", "_up_to", "_has_changed")


class Looks(TorchDispatchMode):
    """Counts, by function of the package, how often the host reads a tensor: for each it would wait for a GPU.

    What is asked of a CPU only does not count, nor what the model's embedding reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.count()
        return function(*args, **(kwargs or {}))

    def count(self) -> None:
        frame: Any = sys._getframe(1)
        while not frame.f_globals["__name__"].startswith("barber."):
            frame = frame.f_back
        if not any(name in frame.f_code.co_qualname for name in _NOT_ON_A_GPU):
            self.found[frame.f_code.co_name] += 1


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Looks]:
    with Looks() as mode, monkeypatch.context() as patch:
        for name in ("tolist", "numpy"):  # these ask no operator
            read = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda *args, read=read: (mode.count(), read(*args))[1])
        yield mode


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("schedule", ["paper", "interleaved"])
@pytest.mark.parametrize("pruner", [Magnitude(), Wanda()], ids=lambda pruner: type(pruner).__name__)
def test_a_block_is_looked_at_once(pruner: Pruner, schedule: Schedule, pattern: Pattern, looks: Looks) -> None:
    """Its figures and its checks at its end, and the checks of a layer's outputs, however many batches there are."""
    walk(pruner, schedule, pattern, Barber())
    assert looks.found == {"_look": 4, "first_failed": 4 + 2}


@pytest.mark.parametrize("granularity", ["input", "layer", "block"])
def test_so_it_is_with_every_granularity(granularity: Any, looks: Looks) -> None:
    walk(Wanda(), "paper", Unstructured(0.5), Barber(granularity=granularity))
    assert looks.found == {"_look": 4, "first_failed": 4 + 2}


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("schedule", ["paper", "interleaved"])
def test_sparsegpt_looks_at_every_hessian_too(schedule: Schedule, pattern: Pattern, looks: Looks) -> None:
    """Whether both its factors could be had. q, k and v have the same one, so have gate and up."""
    walk(SparseGPT(), schedule, pattern, Barber())
    assert looks.found == {"factor_inverse": 2 * 4 * 2, "_look": 4, "first_failed": 4 + 2}


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda()], ids=lambda pruner: type(pruner).__name__)
def test_without_rebuilding_there_is_less_to_look_at(pruner: Pruner, looks: Looks) -> None:
    walk(pruner, "paper", Unstructured(0.5), None)
    assert looks.found == {"_look": 4, "first_failed": 2}


@pytest.mark.parametrize("schedule", ["paper", "interleaved"])
@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT()], ids=lambda pruner: type(pruner).__name__)
@bad_values
def test_a_bad_weight_is_named_and_its_layer_left_alone(value: float, pruner: Pruner, schedule: Schedule) -> None:
    """Choosing and exchanging go on with what is no number until it is looked at, and must not fail themselves."""
    model = tiny.model().train()
    model.model.layers[1].mlp.down_proj.weight.data[1, 2] = value
    before = state_of(model)
    options = {"pattern": Unstructured(0.5), "pruner": pruner, "rebuild": Barber(), "schedule": schedule}
    with pytest.raises(NumericsError, match=r"^model\.layers\.1\.mlp\.down_proj: the weight is NaN or infinite$"):
        prune(model, tiny.tokens(), batch_size=2, **options)
    for key, tensor in model.state_dict().items():
        if "layers.0" not in key:
            assert torch.equal(tensor.nan_to_num(-1), before[key].nan_to_num(-1)), key
        elif "proj" in key:
            assert (tensor == 0).any(), key
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("schedule", ["paper", "interleaved"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (Magnitude(), r"^model\.layers\.0\.self_attn\.q_proj: its input or output is NaN or infinite$"),
        (Wanda(), r"^model\.layers\.0\.self_attn\.q_proj: its input is NaN or infinite$"),
        (SparseGPT(), r"^model\.layers\.0\.self_attn\.q_proj: its input is NaN or infinite$"),
    ],
)
def test_one_sample_that_is_no_number_stops_the_walk(
    pruner: Pruner, message: str, pattern: Pattern, schedule: Schedule
) -> None:
    """Even the last one, in a batch of its own."""
    model = tiny.model("llama")
    tokens_NL = tiny.tokens(5, vocabulary=tiny.VOCABULARY - 1)
    tokens_NL[4, 3] = tiny.VOCABULARY - 1
    model.model.embed_tokens.weight.data[-1] = torch.nan
    with pytest.raises(NumericsError, match=message):
        walk(pruner, schedule, pattern, Barber(), model, tokens_NL)


@pytest.mark.parametrize("schedule", ["paper", "interleaved"])
def test_the_last_output_of_all_is_checked(schedule: Schedule) -> None:
    """Nothing comes after it that would fail: the residual overflows where no block's output does."""
    model = tiny.model("llama")
    layer = model.model.layers[-1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * torch.inf
    with pytest.raises(NumericsError, match=r"^model\.layers\.1: its output is NaN or infinite$"):
        walk(Magnitude(), schedule, Unstructured(0.5), Barber(), model)
