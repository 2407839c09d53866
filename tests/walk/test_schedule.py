"""The interleaved schedule: a block gets its initial mask on the inputs that its rebuilding has, against loops."""

import copy
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from barber import NM, Barber, Magnitude, SparseGPT, Unstructured, Wanda, Weight
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.runtime.precision import Precision
from barber.walk.walk import BlockResult, LinearResult, Schedule, Walk
from tests import oracles, tiny

NUM_SAMPLES = 5
ALPHA = 0.9
PRUNERS: dict[str, Pruner] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}
PATTERNS: dict[str, tuple[Pattern, oracles.Sparsity]] = {
    "unstructured": (Unstructured(0.5), oracles.Sparsity(0.5)),
    "2:4": (NM(2, 4), oracles.Sparsity(n=2, m=4)),
}
methods = pytest.mark.parametrize("method", PRUNERS)
both_patterns = pytest.mark.parametrize("pattern_name", PATTERNS)
# Parallel blocks, norms after them, several linears on one input or one for all of them, weights stored transposed,
# layers with masks of their own.
FAMILIES = ("exaone4", "gpt2", "gpt_neox", "gpt_neox/sequential", "olmo2", "opt/post-norm", "phi3", "stablelm/parallel")

State = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# A slow oracle, in the style of tests/oracles.py


@dataclass
class OnePass:
    """What is left behind: every linear's masks and weight, every block's losses."""

    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    final: dict[str, torch.Tensor] = field(default_factory=dict)
    weight: dict[str, torch.Tensor] = field(default_factory=dict)
    loss_before: list[float] = field(default_factory=list)
    loss_after: list[float] = field(default_factory=list)


def one_pass(
    model: PreTrainedModel, tokens_NL: torch.Tensor, method: str, sparsity: oracles.Sparsity, *, retain: bool = False
) -> OnePass:
    """A llama, block after block, one sample at a time, with a dense copy beside the one whose blocks get rebuilt.

    In a block: the inputs come through everything before it, rebuilt. On them the dense block gives the statistics,
    its own output and the gradients, and the initially pruned block the output that the loss compares.
    """
    dense, sparse = copy.deepcopy(model), copy.deepcopy(model)
    result = OnePass()
    hidden, arguments = _first_inputs(dense, tokens_NL)
    for index, layer in enumerate(sparse.model.layers):
        for part in ("self_attn", "mlp"):
            block, dense_block = getattr(layer, part), getattr(dense.model.layers[index], part)
            prefix = f"model.layers.{index}.{part}."
            calls = [_call_of(block, layer, x_1LD, arguments) for x_1LD in hidden]

            inputs: dict[str, list[np.ndarray]] = {name: [] for name in _linears(dense_block)}
            hooks = [
                module.register_forward_pre_hook(lambda _, args, seen=inputs[name]: seen.append(args[0][0].numpy()))
                for name, module in _linears(dense_block).items()
            ]
            with torch.no_grad():
                for args, kwargs in calls:
                    dense_block(*args, **kwargs)
            for hook in hooks:
                hook.remove()

            pruned = {}
            for name, module in _linears(block).items():
                weight = module.weight.detach().numpy()
                if method == "sparsegpt":
                    mask, weight = oracles.sparsegpt(weight, inputs[name], sparsity)
                elif method == "wanda":
                    mask = oracles.wanda(weight, inputs[name], sparsity)
                else:
                    mask = oracles.magnitude(weight, sparsity)
                pruned[name] = result.initial[prefix + name] = torch.from_numpy(mask)
                module.weight.data = torch.from_numpy(np.where(mask, 0, weight)).float()

            def loss(call: Any, block: nn.Module = block, dense_block: nn.Module = dense_block) -> torch.Tensor:
                args, kwargs = call
                with torch.no_grad():
                    y_sparse = _output(block(*args, **kwargs))
                return (_output(dense_block(*args, **kwargs)) - y_sparse).square().mean()

            weights = {name: module.weight for name, module in _linears(dense_block).items()}
            squared, losses = oracles.mean_squared_gradient(loss, weights, calls)
            result.loss_before.append(math.fsum(losses) / len(losses))
            kept = {name: weight.detach() for name, weight in weights.items()}
            if retain:
                updated = {name: module.weight.detach() for name, module in _linears(block).items()}
                kept = {name: torch.where(pruned[name], kept[name], updated[name]) for name in kept}
            score = {name: kept[name].abs().double() * torch.from_numpy(squared[name]).sqrt() for name in kept}
            for name, module in _linears(block).items():
                rows = zip(score[name].tolist(), pruned[name].tolist(), strict=True)
                if sparsity.m is None:
                    final = [oracles.exchange(row, gone, ALPHA)[0] for row, gone in rows]
                else:
                    final = [oracles.exchange_nm_by_row(row, gone, ALPHA, sparsity.m)[0] for row, gone in rows]
                result.final[prefix + name] = torch.tensor(final)
                module.weight.data = kept[name].masked_fill(result.final[prefix + name], 0)
                result.weight[prefix + name] = module.weight.data
            with torch.no_grad():
                result.loss_after.append(math.fsum(loss(call).item() for call in calls) / len(calls))
        with torch.no_grad():
            hidden = [layer(x_1LD, **arguments) for x_1LD in hidden]
    return result


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _output(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _first_inputs(model: PreTrainedModel, tokens_NL: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The embedded samples, and the other arguments of a layer's call: the same for all layers and samples here."""
    hidden, arguments = [], {}
    for tokens_L in tokens_NL:
        args, arguments = _call_of(
            model.model.layers[0], model, None, {"input_ids": tokens_L[None], "use_cache": False}
        )
        hidden.append(args[0])
    return hidden, arguments


def _call_of(inner: nn.Module, outer: nn.Module, x: torch.Tensor | None, arguments: dict[str, Any]) -> Any:
    """What `inner` is called with while `outer` runs."""
    seen = []
    hook = inner.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        outer(*([] if x is None else [x]), **arguments)
    hook.remove()
    return seen[0]


# ---------------------------------------------------------------------------------------------------------------------


@cache
def tokens() -> torch.Tensor:
    return tiny.tokens(NUM_SAMPLES)


def walked(
    model: PreTrainedModel,
    pattern: Pattern,
    pruner: Pruner,
    rebuild: Barber | None,
    schedule: Schedule = "interleaved",
    batch_size: int = 2,
    keep_graphs: bool = True,
    precision: Precision | None = None,
) -> tuple[list[BlockResult], State]:
    """What the walk gives, and the model that it leaves."""
    walk = Walk(
        model,
        tokens(),
        pattern,
        pruner,
        [rebuild] if rebuild else [],
        torch.device("cpu"),
        batch_size,
        schedule=schedule,
        keep_graphs=keep_graphs,
        precision=precision or Precision(),
    )
    return list(walk), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def linears(results: list[BlockResult]) -> dict[str, LinearResult]:
    return {linear.name: linear for block in results for linear in block.linears}


def losses(results: list[BlockResult]) -> list[tuple[float | None, float | None]]:
    return [(block.loss_before, block.loss_after) for block in results]


@cache
def interleaved_llama(
    method: str, pattern_name: str, batch_size: int = 2, keep_graphs: bool = True
) -> tuple[list[BlockResult], State]:
    model, pattern = tiny.model("llama"), PATTERNS[pattern_name][0]
    return walked(model, pattern, PRUNERS[method], Barber(alpha=ALPHA), "interleaved", batch_size, keep_graphs)


@cache
def expected(method: str, pattern_name: str) -> OnePass:
    return one_pass(tiny.model("llama"), tokens(), method, PATTERNS[pattern_name][1])


def same(one: tuple[list[BlockResult], State], other: tuple[list[BlockResult], State]) -> None:
    """The same bits: masks, initially pruned weights, losses, and the model."""
    (results, model), (results_too, model_too) = one, other
    assert losses(results) == losses(results_too)
    for name, linear in linears(results).items():
        too = linears(results_too)[name]
        assert torch.equal(linear.initial.mask_OI, too.initial.mask_OI), name
        assert torch.equal(linear.initial.weight_OI, too.initial.weight_OI), name
        assert torch.equal(linear.final.mask_OI, too.final.mask_OI), name
    assert all(torch.equal(tensor, model_too[name]) for name, tensor in model.items())


@pytest.mark.parametrize("keep_graphs", [True, False])
@both_patterns
@methods
def test_it_leaves_the_masks_of_the_loops(method: str, pattern_name: str, keep_graphs: bool) -> None:
    results, model = interleaved_llama(method, pattern_name, keep_graphs=keep_graphs)
    loops = expected(method, pattern_name)
    assert linears(results).keys() == loops.final.keys()
    for name, linear in linears(results).items():
        assert torch.equal(linear.initial.mask_OI, loops.initial[name]), name
        assert torch.equal(linear.final.mask_OI, loops.final[name]), name
        assert torch.equal(model[f"{name}.weight"], loops.weight[name]), name
    assert [block.loss_before for block in results] == pytest.approx(loops.loss_before, rel=1e-4)
    assert [block.loss_after for block in results] == pytest.approx(loops.loss_after, rel=1e-4)
    assert all(sum(linear.num_exchanged for linear in block.linears) > 20 for block in results)


def test_so_it_is_with_retained_reconstruction() -> None:
    rebuild = Barber(alpha=ALPHA, retain_reconstruction=True)
    results, model = walked(tiny.model("llama"), Unstructured(0.5), SparseGPT(), rebuild)
    loops = one_pass(tiny.model("llama"), tokens(), "sparsegpt", oracles.Sparsity(0.5), retain=True)
    for name, linear in linears(results).items():
        assert torch.equal(linear.final.mask_OI, loops.final[name]), name
        torch.testing.assert_close(model[f"{name}.weight"], loops.weight[name], rtol=1e-3, atol=1e-4)


@both_patterns
@methods
def test_running_the_dense_pass_again_gives_the_same_bits(method: str, pattern_name: str) -> None:
    same(interleaved_llama(method, pattern_name), interleaved_llama(method, pattern_name, keep_graphs=False))


@pytest.mark.parametrize("precision", [Precision("bfloat16", "float32"), Precision("float32", "bfloat16")], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_so_it_does_in_mixed_precision(family: str, precision: Precision) -> None:
    same(
        walked(tiny.model(family), Unstructured(0.5), Wanda(), Barber(alpha=ALPHA), precision=precision),
        walked(
            tiny.model(family),
            Unstructured(0.5),
            Wanda(),
            Barber(alpha=ALPHA),
            precision=precision,
            keep_graphs=False,
        ),
    )


@pytest.mark.parametrize("batch_size", [1, 3])
@both_patterns
@methods
def test_the_batch_size_changes_no_mask(method: str, pattern_name: str, batch_size: int) -> None:
    before = linears(interleaved_llama(method, pattern_name)[0])
    for name, linear in linears(interleaved_llama(method, pattern_name, batch_size)[0]).items():
        assert torch.equal(linear.initial.mask_OI, before[name].initial.mask_OI), name
        assert torch.equal(linear.final.mask_OI, before[name].final.mask_OI), name


@methods
def test_two_walks_leave_the_same_bits(method: str) -> None:
    again = walked(tiny.model("llama"), Unstructured(0.5), PRUNERS[method], Barber(alpha=ALPHA))
    same(again, interleaved_llama(method, "unstructured"))


@both_patterns
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_activations_in_the_initial_mask_it_is_the_papers(family: str, pattern_name: str) -> None:
    """Magnitude needs no inputs: both schedules do the same."""
    pattern = PATTERNS[pattern_name][0]
    paper, interleaved = (
        walked(tiny.model(family), pattern, Magnitude(), Barber(alpha=ALPHA), schedule)
        for schedule in ("paper", "interleaved")
    )
    same(paper, interleaved)


@both_patterns
@methods
def test_without_rebuilding_it_is_the_papers(method: str, pattern_name: str) -> None:
    """There are no inputs of the rebuilding then."""
    pattern = PATTERNS[pattern_name][0]
    paper, interleaved = (
        walked(tiny.model("llama"), pattern, PRUNERS[method], None, schedule) for schedule in ("paper", "interleaved")
    )
    same(paper, interleaved)


@methods
def test_the_first_block_is_the_papers_and_the_others_are_not(method: str) -> None:
    """Its inputs are the embedded tokens in both; what comes later has seen rebuilt weights instead of pruned ones."""
    if method == "magnitude":
        pytest.skip("needs no inputs")
    paper, _ = walked(tiny.model("llama"), Unstructured(0.5), PRUNERS[method], Barber(alpha=ALPHA), "paper")
    interleaved, _ = interleaved_llama(method, "unstructured")
    for block, other in zip(paper, interleaved, strict=True):
        equal = [
            torch.equal(linear.initial.mask_OI, too.initial.mask_OI)
            for linear, too in zip(block.linears, other.linears, strict=True)
        ]
        assert all(equal) == (block is paper[0]), (block.layer, block.block)


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_a_metric_without_gradients_takes_none(keep_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks are those of the loops where the scores are the weights."""
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a gradient was taken"))
    model = tiny.model("llama")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rebuild = Barber(alpha=ALPHA, metric=Weight())
    results, _ = walked(model, Unstructured(0.5), Wanda(), rebuild, keep_graphs=keep_graphs)
    for name, linear in linears(results).items():
        score, pruned = dense[f"{name}.weight"].abs().tolist(), linear.initial.mask_OI.tolist()
        rows = [oracles.exchange(row, gone, ALPHA)[0] for row, gone in zip(score, pruned, strict=True)]
        assert linear.final.mask_OI.tolist() == rows, name
    assert all(block.loss_before and block.loss_after for block in results)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_kind_have_the_same_bits_with_kept_graphs_and_without(family: str) -> None:
    walks = []
    for keep_graphs in (True, False):
        model = tiny.model(family)
        walks.append(walked(model, NM(2, 4), Wanda(), Barber(alpha=ALPHA), keep_graphs=keep_graphs))
        for linear in linears(walks[-1][0]).values():
            assert (linear.final.mask_OI.reshape(-1, 4).sum(dim=1) == 2).all(), linear.name
    same(*walks)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("keep_graphs", [True, False])
def test_gradients_are_taken_at_the_dense_weights(
    family: str, keep_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autograd has them for a layer whose only block in question is dense, whatever kind of linear it is made of.

    In the first block of the model both schedules have the same inputs and the same initial masks: so the gradients.
    """
    seen: dict[str, list[dict[str, torch.Tensor]]] = {"paper": [], "interleaved": []}
    for schedule, found in seen.items():
        rebuild = Barber.rebuild

        def note(self: Barber, block: Any, found=found, rebuild=rebuild):
            found.append(dict(block.gradient_OI))
            return rebuild(self, block)

        with monkeypatch.context() as patch:
            patch.setattr(Barber, "rebuild", note)
            walked(
                tiny.model(family),
                Unstructured(0.5),
                Wanda(),
                Barber(alpha=ALPHA),
                schedule,  # type: ignore[arg-type]
                keep_graphs=keep_graphs,
            )
    for name, gradient_OI in seen["paper"][0].items():
        torch.testing.assert_close(seen["interleaved"][0][name], gradient_OI, rtol=1e-4, atol=0, msg=name)
