"""What a method is shown of a block: all of it, each linear with a statistic of its own, from one pass a stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from barber import BarberError, Magnitude, SparseGPT, Swaps, Unstructured, UserError, Wanda, prune
from barber.methods.block import BlockState
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Needs, Rebuilt
from barber.methods.statistics import Hessian, SecondMoment
from barber.model.blocks import Layer
from tests import tiny

HALF = Unstructured(0.5)


@dataclass(frozen=True)
class Looking:
    """A step that changes nothing and keeps what it was shown."""

    seen: list[BlockState] = field(default_factory=list)

    needs: ClassVar[Needs] = Needs(SecondMoment)

    def check(self, pattern: object) -> None: ...

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        self.seen.append(block)
        return {name: Rebuilt(block.pruned[name], torch.tensor(0), block.dense_OI[name]) for name in block.names}


def with_unlike_inputs() -> PreTrainedModel:
    """A llama whose `up` is fed twice what `gate` is fed."""
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    return model


@contextmanager
def counting_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Which block every pass through a layer goes to."""
    passes: list[int] = []
    run_block = Layer.run_block

    def count(layer: Layer, index: int, *given: Any) -> Any:
        passes.append(index)
        return run_block(layer, index, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "run_block", count)
        yield passes


def test_a_step_sees_the_whole_block_when_it_is_the_turn_of_some_of_its_linears() -> None:
    looking = Looking()
    prune(tiny.model("llama"), tiny.tokens(), pattern=HALF, pruner=Wanda(), rebuild=looking)
    turns = [[name.rpartition(".")[2] for name in state.names] for state in looking.seen[:4]]
    assert turns == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for state in looking.seen:
        block = {name.rpartition(".")[0] for name in state.names}
        assert len(block) == 1
        every = {"self_attn": 4, "mlp": 3}[block.pop().rpartition(".")[2]]
        assert len(state.dense_OI) == len(state.pruned) == len(state.patterns) == every
        assert list(state.inputs) == list(state.names)


def test_linears_of_a_stage_have_statistics_of_their_own_from_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    looking, plain = Looking(), Looking()
    with counting_passes(monkeypatch) as passes:
        prune(with_unlike_inputs(), tiny.tokens(), pattern=HALF, pruner=Wanda(), rebuild=looking, batch_size=3)
    with counting_passes(monkeypatch) as expected:
        prune(tiny.model("llama"), tiny.tokens(), pattern=HALF, pruner=Wanda(), rebuild=plain, batch_size=3)
    assert passes == expected
    assert [list(state.names) for state in looking.seen] == [list(state.names) for state in plain.seen]
    gate, up = looking.seen[2].inputs.values()
    torch.testing.assert_close(up, 4 * gate)
    assert plain.seen[2].inputs["model.layers.0.mlp.gate_proj"] is plain.seen[2].inputs["model.layers.0.mlp.up_proj"]


class WithASpare(nn.Module):
    """An MLP with a linear that nothing uses."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner, self.spare = mlp, nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("schedule", ["paper", "interleaved"])
@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT()], ids=lambda pruner: type(pruner).__name__)
def test_a_linear_that_no_sample_reaches_is_an_error_that_names_it(pruner: Pruner, schedule: Any) -> None:
    model = tiny.model("llama")
    model.model.layers[1].mlp = WithASpare(model.model.layers[1].mlp)
    with pytest.raises(BarberError, match=r"^model\.layers\.1\.mlp\.spare is fed nothing by the calibration samples"):
        prune(model, tiny.tokens(), pattern=HALF, pruner=pruner, rebuild=Swaps(), schedule=schedule)


def test_a_block_without_linears_is_refused_before_anything_is_changed() -> None:
    model = tiny.model("llama")
    model.model.layers[1].mlp = nn.Identity()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"^model: model\.layers\.1 of LlamaForCausalLM has no prunable linear in mlp$"):
        prune(model, tiny.tokens(), pattern=HALF, pruner=Wanda())
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


def test_a_pattern_of_every_linear_has_to_be_one_of_every_linear() -> None:
    model = tiny.model("llama")
    with pytest.raises(
        UserError, match=r"^pattern must name every linear .* but has none for model\.layers\.0\.self_attn\.q"
    ):
        prune(model, tiny.tokens(), pattern={}, pruner=Wanda())


def test_methods_get_statistics_that_sum_to_those_of_the_whole_layer() -> None:
    """The sums are let go of one by one; what a pruner is shown of a linear is not touched by that."""
    seen: dict[str, torch.Tensor] = {}

    class Noting(SparseGPT):
        def prune(self, block: BlockState) -> Any:
            seen.update({name: block.inputs[name].clone() for name in block.names})
            return super().prune(block)

    prune(tiny.model("llama"), tiny.tokens(), pattern=HALF, pruner=Noting())
    model, x = tiny.model("llama"), []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, args: x.append(args[0][0]))
    for tokens_L in tiny.tokens():
        model(tokens_L[None])
    expected = Hessian(len(x))
    for x_TI in x:
        expected.add(x_TI.detach())
    assert len(seen) == 14
    torch.testing.assert_close(seen["model.layers.0.mlp.up_proj"], expected.value(), rtol=1e-4, atol=1e-4)
