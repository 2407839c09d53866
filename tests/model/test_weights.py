"""The merely pruned model comes out of the rebuilt one exactly, and goes back into it exactly."""

import pytest
import torch
from transformers import PreTrainedModel

from barber import NM, Barber, SparseGPT, Unstructured, Wanda
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.model.decoder import Decoder
from barber.model.weights import InMemory
from tests import tiny
from tests.pruning import prune

# float32 and bfloat16 numbers as the integers of the same bits: 0.0 and -0.0 differ, as do NaNs.
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}

State = dict[str, torch.Tensor]
HALF, REBUILD = Unstructured(0.5), Barber(alpha=0.9)
RETAINED = Barber(alpha=0.9, granularity="layer", retain_reconstruction=True)
families = pytest.mark.parametrize("family", ["llama", "gpt2"])


def bits(model: PreTrainedModel) -> State:
    return {name: tensor.clone().view(BITS[tensor.dtype]) for name, tensor in model.state_dict().items()}


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rebuilt_and_pruned(
    family: str, pruner: Pruner, pattern: Pattern, rebuild: Barber, dtype: torch.dtype
) -> tuple[PreTrainedModel, InMemory, State]:
    """A rebuilt model, its weights, and what a run without rebuilding leaves of the same model."""
    model, tokens = tiny.model(family).to(dtype), tiny.tokens()
    weights = InMemory(model)
    prune(model, tokens, pattern=pattern, pruner=pruner, rebuild=rebuild, weights=weights, on_layer=weights.note)
    merely_pruned = tiny.model(family).to(dtype)
    prune(merely_pruned, tokens, pattern=pattern, pruner=pruner)
    return model, weights, bits(merely_pruned)


RETAINED = Barber(alpha=0.9, granularity="layer", retain_reconstruction=True)


@pytest.mark.parametrize(
    ("pruner", "pattern", "rebuild", "dtype"),
    [
        *((pruner, HALF, REBUILD, dtype) for pruner in (Wanda(), SparseGPT()) for dtype in BITS),
        *((pruner, NM(2, 4), REBUILD, torch.float32) for pruner in (Wanda(), SparseGPT())),
        (SparseGPT(), HALF, RETAINED, torch.float32),
    ],
    ids=str,
)
@families
def test_the_pruned_model_is_the_one_of_a_run_without_rebuilding(
    family: str, pruner: Pruner, pattern: Pattern, rebuild: Barber, dtype: torch.dtype
) -> None:
    model, weights, merely_pruned = rebuilt_and_pruned(family, pruner, pattern, rebuild, dtype)
    rebuilt = bits(model)
    assert not same(rebuilt, merely_pruned)
    for _ in range(2):  # each stage may be evaluated more than once
        with weights.showing("pruned"):
            assert same(bits(model), merely_pruned)
        assert same(bits(model), rebuilt)
    with weights.showing("rebuilt"):
        assert same(bits(model), rebuilt)
    assert same(bits(model), rebuilt)


@families
def test_an_error_on_the_way_leaves_the_rebuilt_model(family: str) -> None:
    model, weights, _ = rebuilt_and_pruned(family, Wanda(), Unstructured(0.5), Barber(alpha=0.9), torch.float32)
    rebuilt = bits(model)

    def interrupted() -> None:
        with weights.showing("pruned"):
            assert not same(bits(model), rebuilt)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same(bits(model), rebuilt)


@families
def test_the_weights_stay_where_they_are_in_memory(family: str) -> None:
    """Whoever holds a parameter of the model sees the pruned values, too."""
    model, weights, _ = rebuilt_and_pruned(family, Wanda(), Unstructured(0.5), Barber(alpha=0.9), torch.float32)
    linears = Decoder(model).linears
    addresses = [linear.module.weight.data_ptr() for linear in linears]
    with weights.showing("pruned"):
        assert [linear.module.weight.data_ptr() for linear in linears] == addresses
    assert [linear.module.weight.data_ptr() for linear in linears] == addresses


def test_only_the_exchanged_weights_are_kept() -> None:
    """For Wanda: the stage must not grow into a second copy of the model."""
    model = tiny.model("llama")
    weights = InMemory(model)
    report = prune(
        model,
        tiny.tokens(),
        pattern=Unstructured(0.5),
        pruner=Wanda(),
        rebuild=Barber(alpha=0.1, granularity="block"),
        weights=weights,
        on_layer=weights.note,
    )
    assert report.exchanges > 0
    assert sum(len(difference.places_K) for difference in weights._differences.values()) == 2 * report.exchanges


def test_without_rebuilding_there_is_nothing_to_show_but_the_model_as_it_is() -> None:
    """As a run does that has no rebuilding: it is told of no layer, and measures the pruned model."""
    model = tiny.model("llama")
    weights = InMemory(model)
    before = bits(model)
    with weights.showing("dense"):
        assert same(bits(model), before)
    prune(model, tiny.tokens(), pattern=Unstructured(0.5), pruner=Wanda(), weights=weights)
    pruned = bits(model)
    assert not same(pruned, before)
    with weights.showing("pruned"):
        assert same(bits(model), pruned)
    assert same(bits(model), pruned)
