"""Matrix products in bfloat16: what is rounded, what is not, and how much of a mask hangs on it."""

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from barber import NM, Barber, Magnitude, SparseGPT, Unstructured, UserError, Wanda, prune
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.methods.statistics import Hessian, MeanSquaredGradient, SecondMoment
from barber.model.decoder import Decoder
from barber.runtime.activations import ActivationStore
from barber.runtime.precision import Arithmetic, Choice, Precision
from barber.walk.walk import LinearResult, Schedule, Walk
from tests import pruning, tiny
from tests.pruning import State, linears, state_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALPHA = 0.5
KINDS: tuple[Choice, ...] = ("float32", "bfloat16")
PRECISIONS = [Precision(forward, gradient) for forward, gradient in product(KINDS, KINDS)]
PRUNERS: dict[str, Pruner] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}

methods = pytest.mark.parametrize("method", PRUNERS)
precisions = pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: f"{p.forward}-{p.gradient}")
# float32 in full is what every other test of the walk has
rounded = pytest.mark.parametrize("precision", PRECISIONS[1:], ids=lambda p: f"{p.forward}-{p.gradient}")
schedules = pytest.mark.parametrize("schedule", ["paper", "interleaved"])


def walked(
    family: str = "llama",
    method: str = "wanda",
    precision: Precision | None = None,
    schedule: Schedule = "paper",
    pattern: Pattern | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, LinearResult], State, State]:
    """What became of the linears, the model before and the model after."""
    model = tiny.model(family).to(dtype)
    dense = state_of(model)
    options = {"precision": precision or Precision(), "schedule": schedule, "tokens_NL": tiny.tokens(6)}
    results, after = pruning.walked(model, pattern, PRUNERS[method], Barber(alpha=ALPHA), **options)
    return linears(results), dense, after


@cache
def full(family: str, schedule: Schedule = "paper") -> tuple[dict[str, LinearResult], State, State]:
    return walked(family, precision=Precision("float32", "float32"), schedule=schedule)


def share_that_differs(one: dict[str, LinearResult], other: dict[str, LinearResult]) -> float:
    differing = sum(int((one[name].final.mask_OI != other[name].final.mask_OI).sum()) for name in one)
    return differing / sum(linear.final.mask_OI.numel() for linear in one.values())


def check_weights(family: str, linears: dict[str, LinearResult], dense: State, after: State) -> None:
    """The kept weights have the dense model's bits, the others are zero; all else is as it was."""
    pruned = {f"{name}.weight": linear.final.mask_OI for name, linear in linears.items()}
    for name, tensor in after.items():
        expected = dense[name]
        if name in pruned:
            expected = expected.masked_fill(pruned[name].T if family == "gpt2" else pruned[name], 0)
        assert tensor.dtype == dense[name].dtype
        assert torch.equal(tensor, expected), name


# ---------------------------------------------------------------------------------------------------------------------
# Which arithmetic


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Precision().on(CPU) == (Arithmetic("float32", CPU), Arithmetic("float32", CPU))
    for has_bfloat16, kind in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bfloat16, **_: has)
        assert [arithmetic.kind for arithmetic in Precision().on(GPU)] == [kind, kind]
    assert [arithmetic.kind for arithmetic in Precision("tf32", "bfloat16").on(GPU)] == ["tf32", "bfloat16"]


@pytest.mark.parametrize("field", ["forward", "gradient"])
def test_tf32_is_refused_on_a_cpu_before_anything_is_changed(field: str) -> None:
    precision = Precision(**{field: "tf32"})
    precision.check(GPU)
    model = tiny.model("llama")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        UserError, match=rf"^precision.{field} must be float32 or bfloat16 on cpu: tf32 is for GPUs$"
    ) as caught:
        prune(model, tiny.tokens(), pattern=Unstructured(0.5), pruner=Wanda(), precision=precision)
    assert caught.value.field == f"precision.{field}"
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


@schedules
def test_auto_on_a_cpu_has_the_bits_of_float32(schedule: Schedule) -> None:
    auto, explicit = walked(schedule=schedule)[2], full("llama", schedule)[2]
    assert all(torch.equal(tensor, explicit[name]) for name, tensor in auto.items())


def test_bfloat16_ends_with_its_context() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)

    def fails() -> None:
        with Arithmetic("bfloat16", CPU)():
            assert layer(x).dtype == torch.bfloat16
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert layer(x).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_tf32_on_a_gpu_ends_with_its_context() -> None:
    before = torch.get_float32_matmul_precision()

    inside = []

    def fails(kind: Any) -> None:
        with Arithmetic(kind, GPU)():
            inside.append(torch.get_float32_matmul_precision())
            raise KeyError

    try:
        torch.set_float32_matmul_precision("medium")
        for kind in ("tf32", "float32"):
            with pytest.raises(KeyError):
                fails(kind)
        assert inside == ["high", "highest"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------------------------------
# What is computed in it


@schedules
@precisions
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linears_and_gradients_have_the_precision_that_was_asked_for(
    family: str, precision: Precision, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(family)
    passes: dict[bool, set[tuple[torch.dtype, torch.dtype]]] = {False: set(), True: set()}
    gradients: set[tuple[torch.dtype, torch.dtype]] = set()
    add = MeanSquaredGradient.add

    def note(statistic: MeanSquaredGradient, x_BLI: torch.Tensor, gradient_BLO: torch.Tensor) -> None:
        gradients.add((x_BLI.dtype, gradient_BLO.dtype))
        add(statistic, x_BLI, gradient_BLO)

    def see(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        # With autograd on, it is the dense pass that is differentiated.
        passes[torch.is_grad_enabled()].add((weight.dtype, output.dtype))

    monkeypatch.setattr(MeanSquaredGradient, "add", note)
    for linear in Decoder(model).linears:
        linear.module.register_forward_hook(see)
    walk = Walk(
        model, tiny.tokens(), Unstructured(0.5), Wanda(), [Barber()], CPU, 4, precision=precision, schedule=schedule
    )
    list(walk)
    forward, gradient = (getattr(torch, kind) for kind in (precision.forward, precision.gradient))
    assert passes == {False: {(forward, forward)}, True: {(gradient, gradient)}}
    assert gradients == {(gradient, gradient)}
    assert all(stream.dtype == forward for stream in walk.streams.values())


@methods
def test_sums_are_float32_or_better(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added up, and the masks and weights that come of it; the inputs are those of the linears."""
    sums: dict[str, set[torch.dtype]] = {"moment": set(), "hessian": set(), "gradient": set()}
    for kind, statistic, attribute in (
        ("moment", SecondMoment, "_sum_I"),
        ("hessian", Hessian, "_sum_II"),
        ("gradient", MeanSquaredGradient, "_sum_OI"),
    ):

        def add(self: Any, *inputs: torch.Tensor, kind=kind, attribute=attribute, add=statistic.add) -> None:
            add(self, *inputs)
            sums[kind].add(getattr(self, attribute).dtype)

        monkeypatch.setattr(statistic, "add", add)
    linears, _, _ = walked(method=method, precision=Precision("bfloat16", "bfloat16"))
    needed = {"magnitude": "", "wanda": "moment", "sparsegpt": "hessian"}[method]
    exact = {"moment": torch.float64, "hessian": torch.float32}
    assert sums == {kind: {exact[kind]} if kind == needed else set() for kind in exact} | {"gradient": {torch.float32}}
    for linear in linears.values():
        assert linear.initial.weight_OI.dtype == linear.final.weight_OI.dtype == torch.float32


@pytest.mark.parametrize("statistic", [SecondMoment, Hessian])
def test_a_thousand_small_numbers_in_bfloat16_are_not_lost_beside_a_large_one(
    statistic: type[SecondMoment] | type[Hessian],
) -> None:
    """In bfloat16, 256 + 1 is 256."""
    x_TI = torch.ones(1025, 1, dtype=torch.bfloat16)
    x_TI[0] = 16
    total = statistic(1)
    with Arithmetic("bfloat16", CPU)():
        for token_1I in x_TI:
            total.add(token_1I[None])
        factor = 2 if statistic is Hessian else 1
        assert total.value().item() == factor * (256 + 1024)


def test_the_squares_of_gradients_in_bfloat16_are_added_up_in_float32() -> None:
    x_BLI = torch.ones(1025, 1, 1, dtype=torch.bfloat16)
    x_BLI[0] = 16
    total = MeanSquaredGradient(1)
    with Arithmetic("bfloat16", CPU)():
        total.add(x_BLI, torch.ones_like(x_BLI))
    assert total.value().item() == 256 + 1024


def test_activations_wait_in_the_precision_of_forward_passes() -> None:
    model = tiny.model("llama").to(torch.float16)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Decoder(model).inputs(tiny.tokens(), 4, ActivationStore("device", CPU, dtype))
        assert inputs.hidden[0:2].dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# What comes of it


@rounded
@pytest.mark.parametrize("family", tiny.DESCRIPTIONS)
def test_every_family_is_exactly_sparse_and_keeps_its_weights(family: str, precision: Precision) -> None:
    """Rounding to 8 bits shifts a score by a hundredth or so: masks differ where scores are as near as that.

    What differs in a layer differs in all that follow: a tenth of the bits in seven layers is the most that was seen.
    Masks that know nothing of each other differ in half.
    """
    linears, dense, after = walked(family, precision=precision)
    check_weights(family, linears, dense, after)
    for name, linear in linears.items():
        assert (linear.final.mask_OI.sum(dim=1) == linear.final.mask_OI.shape[1] // 2).all(), name
        assert linear.zeros == linear.final.mask_OI.sum()
    assert 0 < share_that_differs(linears, full(family)[0]) < 0.1


@rounded
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "exaone4"])
def test_so_it_is_with_the_interleaved_schedule(family: str, precision: Precision) -> None:
    linears, dense, after = walked(family, precision=precision, schedule="interleaved")
    check_weights(family, linears, dense, after)
    assert 0 < share_that_differs(linears, full(family, "interleaved")[0]) < 0.1


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@methods
def test_the_first_block_has_nearly_the_masks_of_float32(method: str, pattern: Pattern) -> None:
    """Nothing has been computed before it: what differs is its own rounding."""
    exact, rounded = (
        {
            name: linear
            for name, linear in walked(method=method, pattern=pattern, precision=precision)[0].items()
            if name.startswith("model.layers.0.self_attn")
        }
        for precision in (PRECISIONS[0], PRECISIONS[-1])
    )
    assert 0 < share_that_differs(exact, rounded) < 0.03


@rounded
@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.float32, "sparsegpt"), (torch.bfloat16, "sparsegpt"), (torch.bfloat16, "wanda"), (torch.float16, "wanda")],
    ids=str,
)
def test_stored_weights_are_not_rounded(dtype: torch.dtype, method: str, precision: Precision) -> None:
    """Whatever the products are computed in: kept weights are the dense ones, in the model's dtype."""
    check_weights("llama", *walked(method=method, precision=precision, dtype=dtype))


@precisions
def test_weights_that_sparsegpt_updated_are_rounded_once(precision: Precision) -> None:
    """From float32 to the model's dtype, whatever the precision of the products."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.model("llama").to(dtype)
        results, _ = pruning.walked(model, pruner=SparseGPT(), rebuild=None, precision=precision)
        final = {name: linear.final.weight_OI for name, linear in linears(results).items()}
        for linear in Decoder(model).linears:
            assert torch.equal(linear.weight_OI, final[linear.name].to(dtype)), linear.name
        if dtype == torch.float32:
            assert any(not torch.equal(weight_OI, weight_OI.bfloat16().float()) for weight_OI in final.values())


@schedules
def test_two_walks_leave_the_same_bits(schedule: Schedule) -> None:
    one, other = (walked(precision=Precision("bfloat16", "bfloat16"), schedule=schedule)[2] for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
