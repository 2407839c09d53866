"""Sparsity per linear: the published formulas by plain loops, exact totals, and a model that is left as it was."""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedModel

from barber.errors import NumericsError, UserError
from barber.methods.patterns import NM, Exactly, Unstructured
from barber.model.decoder import Decoder
from barber.model.stream import Streamed, opened
from barber.model.weights import InMemory
from barber.runtime.activations import ActivationStore
from barber.runtime.precision import Arithmetic
from barber.runtime.tensors import Tensor
from barber.walk.allocation import OWL, Allocation, ErrorCurves, EvoPress, Setting
from barber.walk.allocation.base import rounded
from barber.walk.allocation.error import Curve, cheapest, lower_hull
from barber.walk.allocation.evopress import Ladder
from tests import tiny
from tests.cli.running import save_model

# Neither a slow machine nor chance may fail these tests.
QUICK = settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
CPU = torch.device("cpu")
SAMPLES, LENGTH = 5, 16  # samples that batches of 2 do not divide
TOKENS_NL = tiny.tokens(SAMPLES, LENGTH)

SEARCH = EvoPress(generations=4, offspring=4, survivors=[2, 1], tokens=[LENGTH, SAMPLES * LENGTH], step=0.05)
METHODS: dict[str, Allocation] = {"owl": OWL(), "error": ErrorCurves(levels=3), "evopress": SEARCH}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def setting(model: PreTrainedModel, sparsity: float = 0.5, **changes: Any) -> Setting:
    options: dict[str, Any] = {
        "tokens_NL": TOKENS_NL,
        "weights": InMemory(model),
        "device": CPU,
        "batch_size": 2,
        "store": ActivationStore("device", CPU, torch.float32),
        "arithmetic": Arithmetic("float32", CPU),
    }
    return Setting(model, sparsity=sparsity, **options | changes)


def sizes_of(model: PreTrainedModel) -> dict[str, int]:
    return {linear.name: linear.weight_OI.numel() for linear in Decoder(model).linears}


# ---------------------------------------------------------------------------------------------------------------------
# What the dense model does, by hooks on a whole forward pass


def wanda_scores(model: PreTrainedModel) -> dict[str, Tensor]:
    """|W| times the norm of its inputs in the dense model, in float64: (O, I) by linear."""
    square: dict[str, Tensor] = {}

    def add(name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        square[name] = square.get(name, 0) + args[0].flatten(0, -2).double().square().sum(dim=0)

    linears = Decoder(model).linears
    handles = [linear.module.register_forward_pre_hook(partial(add, linear.name)) for linear in linears]
    with torch.no_grad():
        model(TOKENS_NL)
    for handle in handles:
        handle.remove()
    return {linear.name: linear.weight_OI.double().abs() * square[linear.name].sqrt() for linear in linears}


@contextmanager
def pruned(model: PreTrainedModel, counts: dict[str, int]) -> Iterator[None]:
    """The model with as many weights of lowest score of some linears zeroed."""
    scores, linears = wanda_scores(model), Decoder(model).linears
    before = {linear.name: linear.weight_OI.clone() for linear in linears}
    for linear in linears:
        if linear.name in counts:
            linear.weight_OI[Exactly(counts[linear.name]).prune_rows(scores[linear.name])] = 0
    yield
    for linear in linears:
        linear.weight_OI.copy_(before[linear.name])


def kl_divergence(model: PreTrainedModel, counts: dict[str, int], num_tokens: int) -> float:
    """The mean over the tokens of the first samples, distribution by distribution."""
    tokens_NL = TOKENS_NL[: num_tokens // LENGTH]
    with torch.no_grad():
        dense_NLV = model(tokens_NL).logits.double().softmax(dim=-1)
        with pruned(model, counts):
            sparse_NLV = model(tokens_NL).logits.double().softmax(dim=-1)
    return (dense_NLV * (dense_NLV / sparse_NLV).log()).sum(dim=-1).mean().item()


def outputs_of_layers(model: PreTrainedModel) -> list[Tensor]:
    outputs: list[Tensor] = []
    layers = Decoder(model).layers
    handles = [layer.module.register_forward_hook(lambda _, __, y: outputs.append(y)) for layer in layers]
    with torch.no_grad():
        model(TOKENS_NL)
    for handle in handles:
        handle.remove()
    return [(output[0] if isinstance(output, tuple) else output).double() for output in outputs]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of weights


@st.composite
def shares(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, float], int]:
    """Sizes, ideal numbers that may lie outside and add up to anything, and a total."""
    sizes = draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=8))
    ideal = [size * draw(st.floats(-0.5, 1.5)) for size in sizes]
    total = int(sum(sizes) * draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)))
    return dict(zip("abcdefgh", sizes, strict=False)), dict(zip("abcdefgh", ideal, strict=False)), total


@QUICK
@given(shares())
def test_rounding_makes_the_total_exact(case: tuple[dict[str, int], dict[str, float], int]) -> None:
    sizes, ideal, total = case
    counts = rounded(ideal, sizes, total)
    assert sum(counts.values()) == total
    assert all(0 <= counts[name] <= size for name, size in sizes.items())


@QUICK
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.floats(0, 1))
def test_rounding_changes_what_adds_up_already_by_less_than_two_weights(many: list[int], share: float) -> None:
    """One for the total, which is a whole number, and one for the linear's own."""
    sizes = {str(number): size for number, size in enumerate(many)}
    ideal = {name: size * share for name, size in sizes.items()}
    counts = rounded(ideal, sizes, int(sum(many) * share))
    assert all(abs(counts[name] - ideal[name]) < 2 for name in sizes)


def test_what_one_linear_cannot_lose_the_others_do() -> None:
    assert rounded({"a": 12.0, "b": 4.0, "c": 4.0}, {"a": 10, "b": 10, "c": 10}, 20) == {"a": 10, "b": 5, "c": 5}
    assert rounded({"a": -2.0, "b": 6.0, "c": 6.0}, {"a": 10, "b": 10, "c": 10}, 10) == {"a": 0, "b": 5, "c": 5}


@methods
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.93, 0.99])
def test_the_total_is_exact_and_not_uniform(method: Allocation, sparsity: float) -> None:
    model = tiny.model()
    sizes, counts = sizes_of(model), method.allocate(setting(model, sparsity))
    assert list(counts) == list(sizes)
    assert sum(counts.values()) == int(sum(sizes.values()) * sparsity)
    assert all(0 <= counts[name] <= size for name, size in sizes.items())
    if 0 < sparsity < 0.9:
        assert any(abs(counts[name] - size * sparsity) > 2 for name, size in sizes.items())


# ---------------------------------------------------------------------------------------------------------------------
# What all methods have in common


@methods
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "float32") for name in ("gemma2", "gpt2", "gpt_neox", "opt/post-norm", "phi3")), ("llama", "bfloat16")],
)
def test_every_model_is_left_as_it_was(method: Allocation, name: str, kind: Any) -> None:
    dtype = getattr(torch, kind)
    model = tiny.model(name).to(dtype)
    before = {key: (tensor.clone(), tensor.data_ptr()) for key, tensor in model.state_dict().items()}
    computed = {"store": ActivationStore("device", CPU, dtype), "arithmetic": Arithmetic(kind, CPU)}
    counts = method.allocate(setting(model, **computed))
    assert sum(counts.values()) == int(sum(sizes_of(model).values()) * 0.5)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key][0]) and tensor.data_ptr() == before[key][1] and tensor.dtype == dtype


@methods
def test_the_model_is_left_as_it_was_after_an_interruption(method: Allocation) -> None:
    model = tiny.model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    calls: list[int] = []
    due = [0]

    def interrupt(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == due[0]:
            raise KeyboardInterrupt

    handle = Decoder(model).linears[-1].module.register_forward_pre_hook(interrupt)
    method.allocate(setting(model))
    for due[0] in (1, len(calls) // 2, len(calls)):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            method.allocate(setting(model))
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    handle.remove()


@methods
def test_the_batch_size_and_a_caller_in_inference_mode_change_nothing(method: Allocation) -> None:
    model = tiny.model()
    counts = method.allocate(setting(model))
    with torch.inference_mode():
        assert method.allocate(setting(model, batch_size=3)) == counts


@methods
def test_layers_that_stay_on_disk_lose_as_many(method: Allocation, tmp_path: Path) -> None:
    model = tiny.model()
    save_model(model, tmp_path)
    hollow, tensors = opened(AutoConfig.from_pretrained(tmp_path), tmp_path, None)
    counts = method.allocate(setting(hollow, weights=Streamed(hollow, tensors, None)))
    assert counts == method.allocate(setting(model))
    assert all(tensor.is_meta for layer in Decoder(hollow).layers for tensor in layer.module.parameters())


@methods
def test_how_much_is_done_is_told_to_the_end(method: Allocation) -> None:
    told: list[tuple[int, int]] = []
    method.allocate(setting(tiny.model()), lambda *progress: told.append(progress))
    total = 2 + (SEARCH.generations if method is SEARCH else 0)
    assert told == [(done + 1, total) for done in range(total)]


@methods
def test_activations_that_are_not_finite_stop_it(method: Allocation) -> None:
    model = tiny.model()
    Decoder(model).linears[-1].weight_OI[0, 0] = torch.inf
    with pytest.raises(NumericsError, match=r"layers\.1: its output is NaN or infinite"):
        method.allocate(setting(model))


@methods
def test_cells_are_refused_and_shares_are_not(method: Allocation) -> None:
    method.check(Unstructured(0.5))
    with pytest.raises(UserError, match=r"^2:4 stays uniform, .* allocation=uniform$"):
        method.check(NM(2, 4))


# ---------------------------------------------------------------------------------------------------------------------
# OWL


@pytest.mark.parametrize(("outlier", "spread", "sparsity"), [(5.0, 0.08, 0.5), (3.0, 0.2, 0.6), (2.0, 0.0, 0.4)])
def test_owl_is_its_formula(outlier: float, spread: float, sparsity: float) -> None:
    model = tiny.model(num_hidden_layers=4)
    scores = wanda_scores(model)
    outliers = []
    for layer in Decoder(model).layers:
        every = [score for linear in layer.linears for score in scores[linear.name].flatten().tolist()]
        mean = sum(every) / len(every)
        outliers.append(sum(score > outlier * mean for score in every) / len(every))
    assert len(set(outliers)) == 4
    scaled = [(d - min(outliers)) / (max(outliers) - min(outliers)) * 2 * spread for d in outliers]
    kept = [r - sum(scaled) / 4 + 1 - sparsity for r in scaled]
    counts = OWL(outlier, spread).allocate(setting(model, sparsity))
    for layer, share in zip(Decoder(model).layers, kept, strict=True):
        for linear in layer.linears:
            assert abs(counts[linear.name] - linear.weight_OI.numel() * (1 - share)) < 2


# ---------------------------------------------------------------------------------------------------------------------
# Measured errors


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_blocks_error_is_that_of_its_layers_output_with_all_else_dense(name: str) -> None:
    """Of the MLPs: nothing of the layer comes after them that would have to be held."""
    model = tiny.model(name)
    dense = outputs_of_layers(model)
    curves = ErrorCurves(spread=0.3, levels=3).measure(setting(model))
    assert len(curves) == 2 * len(dense)
    for number, layer in enumerate(Decoder(model).layers):
        block = layer.blocks[1]
        assert [count for count, _ in curves[2 * number + 1]] == [
            sum(int(linear.weight_OI.numel() * sparsity) for linear in block.linears) for sparsity in (0.2, 0.5, 0.8)
        ]
        for sparsity, (_, error) in zip((0.2, 0.5, 0.8), curves[2 * number + 1], strict=True):
            counts = {linear.name: int(linear.weight_OI.numel() * sparsity) for linear in block.linears}
            with pruned(model, counts):
                sparse_NLD = outputs_of_layers(model)[number]
            error_NL = (sparse_NLD - dense[number]).square().sum(dim=-1) / dense[number].square().sum(dim=-1)
            assert error == pytest.approx(error_NL.mean().item(), rel=1e-4)


def test_the_error_of_attention_is_what_it_adds_to_the_stream() -> None:
    model = tiny.model()
    layer = Decoder(model).layers[0]
    added: list[Tensor] = []
    handle = layer.blocks[0].modules[0].register_forward_hook(lambda _, __, y: added.append(y[0].double()))
    dense_NLD = outputs_of_layers(model)[0]
    counts = {linear.name: int(linear.weight_OI.numel() * 0.5) for linear in layer.blocks[0].linears}
    with pruned(model, counts):
        added.clear()  # the scores took a pass, too
        outputs_of_layers(model)
    outputs_of_layers(model)
    handle.remove()
    error_NL = (added[0] - added[1]).square().sum(dim=-1) / dense_NLD.square().sum(dim=-1)
    curve = dict(ErrorCurves(levels=3).measure(setting(model))[0])
    assert curve[sum(counts.values())] == pytest.approx(error_NL.mean().item(), rel=1e-4)


def test_the_errors_are_measured_around_the_sparsity() -> None:
    assert ErrorCurves().sparsities(0.5) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert ErrorCurves().sparsities(0.1) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert ErrorCurves(spread=0.3, levels=2).sparsities(0.9) == pytest.approx([0.6, 0.9, 0.95])
    assert ErrorCurves().sparsities(0.97) == pytest.approx([0.77, 0.87, 0.97])


def test_the_allocation_costs_less_than_the_uniform_one() -> None:
    """By the measured curves, the uniform sparsity being one of the points; straight lines between them."""
    model, method = tiny.model(num_hidden_layers=4), ErrorCurves()
    curves = method.measure(setting(model))
    counts = method.allocate(setting(model))
    cost = uniform = 0.0
    for block, curve in zip((b for layer in Decoder(model).layers for b in layer.blocks), curves, strict=True):
        names = [linear.name for linear in block.linears]
        cost += between(lower_hull(curve), sum(counts[name] for name in names))
        uniform += curve[2][1]
        shares = [counts[linear.name] / linear.weight_OI.numel() for linear in block.linears]
        assert max(shares) - min(shares) < 0.01
        assert min(shares) > 0.3 - 0.01
        assert max(shares) < 0.7 + 0.01
    assert cost < 0.99 * uniform


def between(curve: Curve, count: float) -> float:
    """The curve at a number of weights that its points may not have; at its ends where that lies outside."""
    count = min(max(count, curve[0][0]), curve[-1][0])
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= count <= right:
            return low + (high - low) * (count - left) / (right - left)
    return curve[0][1]


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Errors at some numbers of weights, neither rising nor convex everywhere."""
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5, unique=True))
    return [(count, float(draw(st.integers(0, 20)))) for count in sorted(counts)]


@QUICK
@given(curves())
def test_the_hull_is_the_lowest_that_two_points_of_the_curve_can_mix(curve: Curve) -> None:
    hull = lower_hull(curve)
    for count in range(curve[0][0], curve[-1][0] + 1):
        mixed = min(
            between([left, right] if left != right else [left], count)
            for left, right in itertools.combinations_with_replacement(curve, 2)
            if left[0] <= count <= right[0]
        )
        assert between(hull, count) == pytest.approx(mixed, abs=1e-9)


@QUICK
@given(curves(), curves(), st.integers(0, 60))
def test_the_cheapest_split_between_two_blocks_is_that_of_brute_force(one: Curve, other: Curve, total: int) -> None:
    counts = cheapest([one, other], total)
    lowest, highest = one[0][0] + other[0][0], one[-1][0] + other[-1][0]
    assert sum(counts) == min(max(total, lowest), highest)
    hulls = [lower_hull(one), lower_hull(other)]
    best = min(
        between(hulls[0], count) + between(hulls[1], sum(counts) - count)
        for count in range(one[0][0], one[-1][0] + 1)
        if other[0][0] <= sum(counts) - count <= other[-1][0]
    )
    found = sum(between(hull, count) for hull, count in zip(hulls, counts, strict=True))
    assert found == pytest.approx(best, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# EvoPress


def test_the_search_never_ends_farther_from_the_dense_model_than_it_began() -> None:
    model = tiny.model()
    sizes = sizes_of(model)
    uniform = rounded({name: size * 0.6 for name, size in sizes.items()}, sizes, int(sum(sizes.values()) * 0.6))
    before = kl_divergence(model, uniform, SEARCH.tokens[-1])
    after = []
    for generations in (1, 4, 8):
        search = EvoPress(generations, SEARCH.offspring, SEARCH.survivors, SEARCH.tokens, SEARCH.step)
        after.append(kl_divergence(model, search.allocate(setting(model, 0.6)), search.tokens[-1]))
    assert before * (1 + 1e-5) >= after[0]
    assert after[0] * (1 + 1e-5) >= after[1]
    assert after[1] * (1 + 1e-5) >= after[2]
    assert after[2] < 0.95 * before


def test_one_generation_of_one_round_takes_the_nearest_offspring() -> None:
    """All of them by hand: their masks, their divergences."""
    model = tiny.model()
    search = EvoPress(1, 6, [1], [2 * LENGTH], step=0.05, seed=3)
    ladder, chance = Ladder.uniform(setting(model), search.step), random.Random(search.seed)
    parent = (0,) * len(sizes_of(model))
    candidates = [parent, *(ladder.mutated(parent, chance) for _ in range(search.offspring))]
    nearest = min(candidates, key=lambda levels: kl_divergence(model, ladder.counts(levels), 2 * LENGTH))
    assert nearest != parent
    assert search.allocate(setting(model)) == ladder.counts(nearest)


def test_the_search_is_that_of_its_seed() -> None:
    model = tiny.model()
    found = [EvoPress(2, 4, [2, 1], [LENGTH, 2 * LENGTH], 0.05, seed).allocate(setting(model)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_more_tokens_than_there_are_is_all_of_them() -> None:
    model = tiny.model()
    found = [EvoPress(2, 4, [1], [tokens]).allocate(setting(model)) for tokens in (SAMPLES * LENGTH, 10**6)]
    assert found[0] == found[1]


@QUICK
@given(st.data())
def test_a_mutation_moves_a_few_linears_by_equally_many_weights(data: st.DataObject) -> None:
    sizes = {str(number): data.draw(st.integers(1, 300)) for number in range(data.draw(st.integers(1, 5)))}
    total = int(sum(sizes.values()) * data.draw(st.floats(0, 0.99)))
    start = rounded({name: total / len(sizes) for name in sizes}, sizes, total)
    ladder = Ladder(start, sizes, step=data.draw(st.integers(1, 20)))
    levels, chance = (0,) * len(sizes), random.Random(data.draw(st.integers(0, 99)))
    for _ in range(200):
        before, levels = levels, ladder.mutated(levels, chance)
        counts = ladder.counts(levels)
        assert sum(counts.values()) == total
        assert all(0 <= counts[name] <= size for name, size in sizes.items())
        assert sum(abs(a - b) for a, b in zip(before, levels, strict=True)) <= 6
        assert all(-128 < level < 127 for level in levels)


@QUICK
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 7), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_the_index_knows_the_masks_of_all_levels(outputs: int, inputs: int, step: int, share: float, seed: int) -> None:
    """Of as many levels as a byte can tell apart: the search stays within them."""
    score_OI = torch.randint(30, (outputs, inputs), generator=torch.Generator().manual_seed(seed)).float()
    size = outputs * inputs
    start = int(size * share)
    index_OI = Ladder({"it": start}, {"it": size}, step).index("it", score_OI)
    assert index_OI.dtype == torch.int8
    for level in range(max(-127, -(start // step)), min(126, (size - start) // step) + 1):
        assert torch.equal(index_OI <= level, Exactly(start + level * step).prune_rows(score_OI))
