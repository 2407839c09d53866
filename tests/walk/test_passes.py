"""The steps of a rebuilding are shown what plain hooks on whole models would show them, one sample at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from barber import Barber, LeastSquares, Reconstruct, Swaps, Unstructured, Wanda
from barber.methods.block import BlockState, Pruned
from barber.methods.patterns import Pattern
from barber.methods.rebuild import Needs, Rebuild, Rebuilt
from barber.runtime.precision import Precision
from barber.runtime.tensors import Tensor
from barber.walk.walk import BlockResult
from tests import oracles, tiny
from tests.pruning import prune
from tests.states import state

PATTERN = Unstructured(0.5)
STAGES = {
    "self_attn": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
    "mlp": [["gate_proj", "up_proj"], ["down_proj"]],
}
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


def pruned_by(
    steps: Sequence[Rebuild], batch_size: int = 2, family: str = "llama", **options: Any
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny model, and its final masks."""
    model, masks = tiny.model(family), {}

    def note(_: Any, block: BlockResult | None) -> None:
        assert block is not None
        masks.update({linear.name: linear.final.mask_OI for linear in block.linears})

    options = {"pruner": Wanda(), "pattern": PATTERN, "rebuild": steps, "batch_size": batch_size} | options
    prune(model, tiny.tokens(), on_block=note, **options)
    return model, masks


# ---------------------------------------------------------------------------------------------------------------------
# The same, slowly


@torch.no_grad()
def fed_to(model: PreTrainedModel, name: str) -> list[Tensor]:
    """What a module is fed by the whole model, sample by sample: (L, I)."""
    fed: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: fed.append(args[0][0]))
    for tokens_L in tiny.tokens():
        model(input_ids=tokens_L[None], use_cache=False)
    hook.remove()
    return fed


def gaps(dense: PreTrainedModel, sparse: PreTrainedModel, name: str) -> list[Tensor]:
    """What the dense model feeds a module more than the sparse one does."""
    return [meant - fed for meant, fed in zip(fed_to(dense, name), fed_to(sparse, name), strict=True)]


def mean_product(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """Mean over samples of 2 y x^T, summed over tokens."""
    return torch.stack([2 * y.T @ x for y, x in zip(rows, columns, strict=True)]).mean(dim=0)


@torch.no_grad()
def calls_of(model: PreTrainedModel, name: str) -> list[tuple[Any, Any]]:
    """The arguments of a block's call, sample by sample."""
    calls: list[tuple[Any, Any]] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    hook = model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    for tokens_L in tiny.tokens():
        model(input_ids=tokens_L[None], use_cache=False)
    hook.remove()
    return calls


def output_of(block: nn.Module, call: tuple[Any, Any], weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """A block's output, with its own weights or with others."""
    named = {f"{name}.weight": weight for name, weight in (weights or {}).items()}
    output = functional_call(block, named, call[0], call[1])
    return output[0] if isinstance(output, tuple) else output


def squared_gradients(dense: PreTrainedModel, sparse: PreTrainedModel, block: str) -> dict[str, Tensor]:
    weights = {
        name: linear.weight
        for name, linear in dense.get_submodule(block).named_modules()
        if isinstance(linear, nn.Linear)
    }

    def loss(call: Any) -> Tensor:
        with torch.no_grad():
            y_sparse = output_of(sparse.get_submodule(block), call)
        return (output_of(dense.get_submodule(block), call) - y_sparse).square().mean()

    squared, _ = oracles.mean_squared_gradient(loss, weights, calls_of(sparse, block))
    return {f"{block}.{name}": torch.from_numpy(value).float() for name, value in squared.items()}


def rebuilt_slowly(steps: Sequence[Rebuild]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Whole dense and whole sparse models run anew for every look; layers that are not rebuilt yet play no part."""
    dense = tiny.model("llama")
    sparse, masks = pruned_by([])
    for index in range(len(sparse.model.layers)):
        for part, stages in STAGES.items():
            block = f"model.layers.{index}.{part}"
            together = [[f"{block}.{name}" for stage in stages for name in stage]]
            for step in [one for one in steps for _ in range(one.needs.passes)]:
                gradient_OI = squared_gradients(dense, sparse, block) if step.needs.gradient else {}
                apart = [[f"{block}.{name}" for name in stage] for stage in stages]
                for names in together if step.needs.statistic is None else apart:
                    known: dict[str, Any] = {"gradient_OI": gradient_OI}
                    if step.needs.statistic is not None:
                        x, gap = fed_to(sparse, names[0]), gaps(dense, sparse, names[0])
                        drift_II, residual_OI = mean_product(gap, x), {}
                        if names == apart[-1]:  # its output is added to what the block's norm is fed
                            gap = gaps(dense, sparse, f"model.layers.{index}.{NORMS[part]}")
                            residual_OI = dict.fromkeys(names, mean_product(gap, x))
                        known |= {
                            "inputs": dict.fromkeys(names, mean_product(x, x)),
                            "drift": dict.fromkeys(names, drift_II),
                            "residual": residual_OI,
                        }
                    dense_OI = {name: dense.get_submodule(name).weight.detach() for name in names}
                    before = {name: Pruned(masks[name], sparse.get_submodule(name).weight.detach()) for name in names}
                    for name, found in step.rebuild(state(dense_OI, PATTERN, before, **known)).items():
                        masks[name] = found.pruned.mask_OI
                        sparse.get_submodule(name).weight.data = found.pruned.weight_OI
    return sparse, masks


# Two steps of the conjugate gradients: ten would show the last bits of their inputs' sums.
STEPS: dict[str, list[Rebuild]] = {
    "swaps that follow": [Swaps(follow=0.5)],
    "and weights that follow": [Swaps(follow=0.5), LeastSquares(steps=2, follow=1.0)],
    "two rounds": [Barber(alpha=0.5, rounds=2)],
    "gradients after swaps": [Swaps(), Barber(alpha=0.5)],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_steps_leave_what_they_would_leave_if_whole_models_ran_for_every_look(steps: list[Rebuild]) -> None:
    model, masks = pruned_by(steps)
    expected, expected_masks = rebuilt_slowly(steps)
    assert masks.keys() == expected_masks.keys()
    for name, mask_OI in expected_masks.items():
        assert torch.equal(masks[name], mask_OI), name
        torch.testing.assert_close(
            model.get_submodule(name).weight, expected.get_submodule(name).weight, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize(
    ("steps", "others"),
    [
        (STEPS["swaps that follow"], [Swaps()]),
        (STEPS["two rounds"], [Barber(alpha=0.5)]),
        (STEPS["gradients after swaps"], [Barber(alpha=0.5), Swaps()]),
    ],
)
def test_on_this_model_it_matters(steps: list[Rebuild], others: list[Rebuild]) -> None:
    _, masks = pruned_by(steps)
    _, other_masks = pruned_by(others)
    assert any(not torch.equal(mask_OI, other_masks[name]) for name, mask_OI in masks.items() if "layers.1" in name)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_size_changes_no_mask_where_the_dense_model_is_followed(batch_size: int) -> None:
    _, masks = pruned_by([Swaps(follow=0.5)], batch_size)
    _, expected = pruned_by([Swaps(follow=0.5)], 6)
    assert all(torch.equal(mask_OI, expected[name]) for name, mask_OI in masks.items())


@dataclass(frozen=True)
class Restore:
    """The masks that it is told, and the dense weights."""

    masks: Mapping[str, Tensor]

    needs: ClassVar[Needs] = Needs(gradient=True)

    def check(self, pattern: Pattern) -> None: ...

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        masked = {name: Pruned.masking(weight_OI, self.masks[name]) for name, weight_OI in block.dense_OI.items()}
        return {name: Rebuilt(one, torch.tensor(0), one.weight_OI) for name, one in masked.items()}


def test_a_step_that_takes_back_all_that_was_done_leaves_the_initial_outputs() -> None:
    """The gradient for it was taken with other masks, whose outputs must not go on to the next blocks."""
    _, initial = pruned_by([])
    losses = []
    for steps in ([Restore(initial)], [Barber(alpha=1.0), Restore(initial)]):
        model = tiny.model("llama")
        report = prune(model, tiny.tokens(), pattern=PATTERN, pruner=Wanda(), rebuild=steps, batch_size=2)
        losses.append([(block.loss_before, block.loss_after) for block in report.blocks])
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------------------------------
# A block that is tried out


@dataclass(frozen=True)
class Look:
    """Tries the block with its weights as they are, and with others; changes nothing."""

    found: dict[str, Any] = field(default_factory=dict)
    samples: ClassVar[slice] = slice(1, 4)

    needs: ClassVar[Needs] = Needs(trial=True)

    def check(self, pattern: Pattern) -> None: ...

    @staticmethod
    def others(weight_OI: Tensor) -> Tensor:
        """Weights to try."""
        return 1.5 * weight_OI

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        trial = block.trial
        assert trial is not None
        other_OI = {name: self.others(linear.weight_OI) for name, linear in block.pruned.items()}
        first = next(iter(block.pruned))
        self.found[first] = {
            "whole": trial.loss({}, slice(0, trial.num_samples)),
            "part": trial.loss(other_OI, self.samples),
            "one": trial.loss({first: other_OI[first]}, self.samples),
            "gradient": trial.gradient(other_OI, self.samples),
        }
        return {name: Rebuilt(linear, torch.tensor(0), linear.weight_OI) for name, linear in block.pruned.items()}


@pytest.mark.parametrize("family", ["llama", "olmo/clipped"])
def test_a_block_that_is_tried_has_the_loss_and_the_gradient_of_autograd(family: str) -> None:
    look, dense, sparse = Look(), tiny.model(family), tiny.model(family)
    report = prune(sparse, tiny.tokens(), pattern=PATTERN, pruner=Wanda(), rebuild=look, batch_size=4)
    assert len(report.blocks) == len(look.found) == 4
    for block, (first, found) in zip(report.blocks, look.found.items(), strict=True):
        name = first.rpartition(".")[0]
        modules = sparse.get_submodule(name), dense.get_submodule(name)
        inner = [key.removeprefix(f"{name}.") for key in block.linears]
        weights = {key: look.others(modules[0].get_submodule(key).weight.detach()).requires_grad_() for key in inner}
        calls = calls_of(sparse, name)[look.samples]

        def loss(changed: Mapping[str, Tensor], calls: Any = calls, modules: Any = modules) -> Tensor:
            errors = [(output_of(modules[0], call, changed) - output_of(modules[1], call)).square() for call in calls]
            return torch.stack([error.mean() for error in errors]).mean()

        value = loss(weights)
        gradients = torch.autograd.grad(value, list(weights.values()))
        assert found["whole"].item() == pytest.approx(block.loss_before, rel=1e-5)
        assert found["part"].item() == pytest.approx(value.item(), rel=1e-4)
        assert found["gradient"][0].item() == pytest.approx(value.item(), rel=1e-4)
        assert found["one"].item() == pytest.approx(loss({inner[0]: weights[inner[0]]}).item(), rel=1e-4)
        assert found["gradient"][1].keys() == set(block.linears)
        for key, gradient_OI in zip(inner, gradients, strict=True):
            scale = gradient_OI.abs().max().item()
            torch.testing.assert_close(found["gradient"][1][f"{name}.{key}"], gradient_OI, rtol=1e-3, atol=1e-4 * scale)


@dataclass(frozen=True)
class FollowingLook(Look):
    """Asks for the loss against outputs that make up for half of the drift."""

    needs: ClassVar[Needs] = Needs(trial=True, dense=True)

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        assert block.trial is not None
        self.found[next(iter(block.pruned))] = block.trial.gradient({}, slice(0, block.trial.num_samples), follow=0.5)
        return {name: Rebuilt(linear, torch.tensor(0), linear.weight_OI) for name, linear in block.pruned.items()}


def test_a_block_that_follows_aims_half_way_at_the_dense_models_residual_stream() -> None:
    look, dense, sparse = FollowingLook(), tiny.model("llama"), tiny.model("llama")
    prune(sparse, tiny.tokens(), pattern=PATTERN, pruner=Wanda(), rebuild=look, batch_size=4)
    # what the stream is before the attention and the MLP of both layers, and after the last
    norms = [f"model.layers.{layer}.{norm}" for layer in (0, 1) for norm in NORMS.values()] + ["model.norm"]
    for number, (first, (loss, _)) in enumerate(look.found.items()):
        block = first.rpartition(".")[0]
        meant, before = fed_to(dense, norms[number + 1]), fed_to(sparse, norms[number])
        errors = []
        for call, meant_LD, before_LD in zip(calls_of(sparse, block), meant, before, strict=True):
            y_dense, y_sparse = (output_of(model.get_submodule(block), call)[0] for model in (dense, sparse))
            aim_LD = y_dense + 0.5 * (meant_LD - (before_LD + y_dense))
            errors.append((y_sparse - aim_LD).square().mean())
        assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gradients_of_a_tried_block_may_be_more_precise_than_its_outputs(family: str) -> None:
    """The activations wait in bfloat16 then."""
    look = Look()
    pruned_by([look, Reconstruct(learning_rate=1e-4)], family=family, precision=Precision("bfloat16", "float32"))
    assert len(look.found) == 4
    for found in look.found.values():
        assert found["gradient"][0].item() == pytest.approx(found["part"].item(), rel=0.05)
        assert all(gradient_OI.dtype == torch.float32 for gradient_OI in found["gradient"][1].values())
