"""Agreement with the dense model against plain loops in float64 with a second copy of it."""

import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from barber.errors import NumericsError
from barber.evals.agreement import Agreement
from barber.evals.evaluation import Evaluation
from barber.evals.placement import Placement
from barber.evals.results import AgreementResult
from barber.evals.windows import WindowProtocol, Windows
from barber.model.decoder import Decoder
from barber.runtime.plain import plain
from tests import tiny
from tests.evals.measuring import Ids, quiet

CPU = torch.device("cpu")
LENGTH = 12
COUNT = 4 * LENGTH + 5

both = pytest.mark.parametrize("placement", ["whole", "layers"])

#: The decoder layers of a model and the names of their two blocks, without the families' help.
LAYERS: dict[str, Callable[[PreTrainedModel], nn.ModuleList]] = {
    "llama": lambda model: model.model.layers,
    "gpt2": lambda model: model.transformer.h,
    "gemma2": lambda model: model.model.layers,
}
BLOCKS = {"gpt2": ("attn", "mlp")}
families = pytest.mark.parametrize("family", list(LAYERS))


def windows(protocol: WindowProtocol) -> Windows:
    return protocol.cut(Ids(COUNT), Ids(COUNT).tokens(None), None)


def pruned(dense: PreTrainedModel, share: float = 0.4) -> PreTrainedModel:
    """A copy without the smallest weights of every linear in its decoder layers."""
    model = copy.deepcopy(dense)
    for linear in Decoder(model).linears:
        weight = linear.module.weight.data
        weight[weight.abs() < weight.abs().flatten().quantile(share)] = 0
    return model


def compare(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    protocol: WindowProtocol | None = None,
    *,
    block_positions: int = 10,
    batch_size: int = 3,
    placement: Placement = "whole",
    perplexity: bool = False,
) -> AgreementResult:
    """The agreement, as a run measures it: first the dense model, then the other."""
    spec = Evaluation(
        stages=["pruned"],
        texts={"text": Ids(COUNT)},
        windows=[protocol or WindowProtocol(LENGTH)],
        perplexity=perplexity,
        agreement=Agreement(block_positions),
        batch_size=batch_size,
        placement=placement,
    )
    prepared = spec.prepare(None, Path("nowhere"))
    assert prepared.measure("dense", dense, CPU, quiet) is None
    results = prepared.measure("pruned", sparse, CPU, quiet)
    assert results is not None
    assert plain(results).keys() == ({"agreement", "perplexity"} if perplexity else {"agreement"})
    return results.agreement["text"]


def divergence(p_V: list[float], q_V: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(p_V, q_V, strict=True))


def divergences(
    dense: PreTrainedModel, sparse: PreTrainedModel, found: Windows
) -> tuple[list[list[float]], list[list[bool]]]:
    """KL and equality of the likeliest token at every scored position of every window."""
    kl, same = [], []
    for number, window_L in enumerate(found.tokens_NL):
        with torch.no_grad():
            p_LV, q_LV = (model(window_L[None]).logits[0].double().softmax(-1) for model in (dense, sparse))
        places = range(found.scored(number).start, found.scored(number).stop)
        kl.append([divergence(p_LV[t].tolist(), q_LV[t].tolist()) for t in places])
        same.append([p_LV[t].argmax().item() == q_LV[t].argmax().item() for t in places])
    return kl, same


def block_outputs(family: str, model: PreTrainedModel, found: Windows) -> dict[str, torch.Tensor]:
    """What every block of a layer gives at all positions of all windows."""
    outputs: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for index, layer in enumerate(LAYERS[family](model)):
        for name, attribute in zip(("attention", "mlp"), BLOCKS.get(family, ("self_attn", "mlp")), strict=True):
            parts = outputs.setdefault(f"{index}.{name}", [])

            def take(_: nn.Module, __: Any, y: Any, parts: list[torch.Tensor] = parts) -> None:
                parts.append(y[0][0] if isinstance(y, tuple) else y[0])

            hooks.append(getattr(layer, attribute).register_forward_hook(take))
    with torch.no_grad():
        for window_L in found.tokens_NL:
            model(window_L[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in outputs.items()}


def flat(windows_of: list[list[float]] | list[list[bool]]) -> list[float]:
    return [float(value) for window in windows_of for value in window]


def standard_error(windows_of: list[list[float]] | list[list[bool]]) -> float:
    return statistics.stdev(statistics.mean(map(float, window)) for window in windows_of) / math.sqrt(len(windows_of))


@both
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("stride", [None, 5])
@families
def test_divergence_and_agreement_are_those_of_the_plain_loop(
    family: str, stride: int | None, batch_size: int, placement: Placement
) -> None:
    dense, protocol = tiny.model(family), WindowProtocol(LENGTH, stride)
    sparse, found = pruned(dense), windows(protocol)
    kl, same = divergences(dense, sparse, found)
    results = compare(dense, sparse, protocol, batch_size=batch_size, placement=placement)
    assert results.kl_divergence == pytest.approx(statistics.mean(flat(kl)), rel=1e-3, abs=1e-7)
    assert results.kl_standard_error == pytest.approx(standard_error(kl), rel=1e-3, abs=1e-7)
    assert results.top1_agreement == pytest.approx(statistics.mean(flat(same)), rel=1e-6)
    assert results.top1_standard_error == pytest.approx(standard_error(same), rel=1e-4)
    assert results.kl_divergence > 0
    assert (results.windows, results.tokens) == (len(kl), len(flat(kl)))
    assert results.protocol == found.protocol
    assert results.digest == found.digest


@both
@families
def test_block_errors_are_shares_of_the_dense_blocks_squares(family: str, placement: Placement) -> None:
    dense = tiny.model(family)
    sparse, found = pruned(dense), windows(WindowProtocol(LENGTH))
    positions = [0, 6, 13, 20, 27, 34, 41]  # 7 of 48, spread evenly
    expected = {}
    other = block_outputs(family, sparse, found)
    for name, dense_TD in block_outputs(family, dense, found).items():
        distance = sum((other[name][t] - dense_TD[t]).square().sum().item() for t in positions)
        expected[name] = distance / sum(dense_TD[t].square().sum().item() for t in positions)
    results = compare(dense, sparse, block_positions=7, placement=placement)
    assert list(results.block_errors) == list(expected)
    assert results.block_errors == pytest.approx(expected, rel=1e-4)
    assert results.block_positions == 7
    assert all(error > 0 for error in expected.values())


@both
@pytest.mark.parametrize("name", tiny.DESCRIPTIONS)
def test_an_unchanged_model_agrees_with_itself(name: str, placement: Placement) -> None:
    dense = tiny.model(name)
    results = compare(dense, copy.deepcopy(dense), placement=placement)
    assert results.kl_divergence == 0
    assert results.top1_agreement == 1
    assert set(results.block_errors.values()) == {0}
    assert list(results.block_errors) == [
        f"{index}.{block.name}" for index, layer in enumerate(Decoder(dense).layers) for block in layer.blocks
    ]


def test_the_dense_model_may_be_the_very_one_that_is_pruned_later() -> None:
    """As in a run: what was taken down of it must not change with its weights."""
    model = tiny.model("llama")
    sparse = pruned(model)
    expected = compare(copy.deepcopy(model), sparse)

    spec = Evaluation(["pruned"], {"text": Ids(COUNT)}, [WindowProtocol(LENGTH)], False, Agreement(10))
    prepared = spec.prepare(None, Path("nowhere"))
    prepared.measure("dense", model, CPU, quiet)
    model.load_state_dict(sparse.state_dict())
    results = prepared.measure("pruned", model, CPU, quiet)
    assert results is not None
    assert results.agreement["text"].kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-5)
    assert results.agreement["text"].block_errors == pytest.approx(expected.block_errors, rel=1e-5)


def test_the_further_a_model_is_pruned_the_less_it_agrees() -> None:
    dense = tiny.model("llama")
    results = [compare(dense, pruned(dense, share)) for share in (0.2, 0.5, 0.8)]
    for values in (
        [found.kl_divergence for found in results],
        [min(found.block_errors.values()) for found in results],
    ):
        assert values == sorted(values)


def test_a_very_sure_model_has_a_finite_divergence() -> None:
    """Tokens whose probability is zero in float32 count nothing."""
    dense = tiny.model("llama")
    dense.lm_head.weight.data.mul_(1e3)
    sparse = pruned(dense)
    results, found = compare(dense, sparse), windows(WindowProtocol(LENGTH))
    with torch.no_grad():
        p_NLV, q_NLV = (model(found.tokens_NL).logits[:, :-1].double().log_softmax(-1) for model in (dense, sparse))
    expected = (p_NLV.exp() * (p_NLV - q_NLV)).sum(-1).mean().item()
    assert results.kl_divergence == pytest.approx(expected, rel=1e-4)


def test_perplexity_is_measured_in_the_same_pass() -> None:
    dense = tiny.model("llama")
    calls = []
    hook = dense.lm_head.register_forward_hook(lambda *_: calls.append(1))
    compare(dense, pruned(tiny.model("llama")), perplexity=True, batch_size=4)
    hook.remove()
    assert len(calls) == 1


@both
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_divergence_that_is_no_number_stops_the_evaluation(number: float, placement: Placement) -> None:
    dense = tiny.model("llama")
    broken = copy.deepcopy(dense)
    broken.model.layers[1].mlp.down_proj.weight.data[3] = number
    with pytest.raises(NumericsError, match="divergence from the dense one is NaN or infinite"):
        compare(dense, broken, placement=placement)


def test_a_block_that_gives_nothing_has_no_error() -> None:
    dense = tiny.model("llama")
    dense.model.layers[1].mlp.down_proj.weight.data.zero_()
    results = compare(dense, pruned(dense))
    assert results.block_errors["1.mlp"] is None
    assert results.block_errors["0.mlp"] > 0


@pytest.mark.parametrize("block_positions", [4 * LENGTH, 4 * LENGTH + 1, 10_000])
def test_no_more_positions_are_compared_than_there_are_tokens(block_positions: int) -> None:
    dense = tiny.model("llama")
    sparse, found = pruned(dense), windows(WindowProtocol(LENGTH))
    results = compare(dense, sparse, block_positions=block_positions)
    assert results.block_positions == 4 * LENGTH
    other = block_outputs("llama", sparse, found)
    for name, dense_TD in block_outputs("llama", dense, found).items():
        expected = ((other[name] - dense_TD).square().sum() / dense_TD.square().sum()).item()
        assert results.block_errors[name] == pytest.approx(expected, rel=1e-4)


def test_one_window_has_no_standard_error() -> None:
    dense = tiny.model("llama")
    results = compare(dense, pruned(dense), WindowProtocol(LENGTH, max_windows=1))
    assert results.kl_standard_error is None
    assert results.top1_standard_error is None
