"""Every supported family: the walk sees what the model itself computes, prunes exactly, and the result reloads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from barber import NM, Barber, Magnitude, SparseGPT, Unstructured, UserError, Wanda, prune
from barber.model.blocks import main_output
from barber.model.decoder import Decoder
from barber.model.driver import Stream
from barber.model.families import supported
from barber.runtime.activations import ActivationStore
from barber.walk.checks import check_architecture
from tests import tiny

NAMES = list(tiny.CONFIGS)
CPU = torch.device("cpu")
STORE = ActivationStore("device", CPU, torch.float32)


def test_every_family_file_has_a_tiny_model() -> None:
    assert {name.split("/")[0] for name in NAMES} == set(supported())


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_of_the_walk_are_those_of_the_model(name: str) -> None:
    model, tokens_NL = tiny.model(name), tiny.tokens(num_samples=5)
    decoder = Decoder(model)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.module.register_forward_hook(lambda _, __, output: seen.append(main_output(output)))
        for layer in decoder.layers
    ]
    with torch.no_grad():
        model(tokens_NL, use_cache=False)
    for hook in hooks:
        hook.remove()

    inputs = decoder.inputs(tokens_NL, batch_size=2, store=STORE)  # batches of 2, 2 and 1
    stream = Stream(inputs, inputs.hidden, batch_size=2)
    for index, layer in enumerate(decoder.layers):
        with layer.onloaded(CPU), torch.no_grad():
            for batch, call in stream.calls(index):
                stream.hidden[batch] = layer.run(call)
        torch.testing.assert_close(stream.hidden[slice(None)], seen[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_put_together_from_its_blocks_is_the_layer(name: str) -> None:
    decoder = Decoder(tiny.model(name))
    inputs = decoder.inputs(tiny.tokens(num_samples=3), batch_size=3, store=STORE)
    for index, layer in enumerate(decoder.layers):
        call = inputs.call(index, inputs.hidden[slice(None)])
        done: list[torch.Tensor] = []
        with torch.no_grad():
            for position, block in enumerate(layer.blocks):
                block_call, output = layer.run_block(position, call, done)
                torch.testing.assert_close(block.run(block_call), output, rtol=0, atol=0)
                done.append(output.view_as(call.x))  # OPT's MLP gives the tokens of all samples in one row
            torch.testing.assert_close(layer.finish(call, done), layer.run(call), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_of_a_layer_is_in_one_block(name: str) -> None:
    for layer in Decoder(tiny.model(name)).layers:
        inside = {id(module) for module in layer.module.modules() if getattr(module, "weight", None) is not None}
        matrices = {key for key in inside if any(id(m) == key and m.weight.ndim == 2 for m in layer.module.modules())}
        assert {id(linear.module) for linear in layer.linears} == matrices
        assert len(layer.linears) == len(matrices)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_is_exactly_sparse_and_reloads(name: str, pattern: Unstructured | NM, tmp_path: Path) -> None:
    model, tokens_NL = tiny.model(name), tiny.tokens()
    report = prune(model, tokens_NL, pattern=pattern, pruner=Wanda(), rebuild=Barber(alpha=0.3))
    assert report.sparsity == 0.5
    assert report.exchanges > 0
    if isinstance(pattern, NM):
        for linear in Decoder(model).linears:
            zeros_CM = (linear.weight_OI == 0).reshape(-1, pattern.m).sum(dim=1)
            assert (zeros_CM == pattern.m - pattern.n).all(), linear.name

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens_NL).logits, model(tokens_NL).logits)
    for before, after in zip(Decoder(model).linears, Decoder(again).linears, strict=True):
        assert torch.equal(before.weight_OI == 0, after.weight_OI == 0)


@pytest.mark.parametrize("pruner", [Magnitude(), SparseGPT()], ids=lambda pruner: type(pruner).__name__)
@pytest.mark.parametrize("name", ["gpt2", "opt/post-norm", "gpt_neox", "gemma3_text"])
def test_the_other_pruners_leave_as_many_zeros(name: str, pruner: Magnitude | SparseGPT) -> None:
    report = prune(tiny.model(name), tiny.tokens(), pattern=NM(2, 4), pruner=pruner, rebuild=Barber(alpha=0.3))
    assert report.sparsity == 0.5


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("olmoe", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
        ("deepseek_v3", "mixture of experts"),
        ("dbrx", "mixture of experts"),
        ("bert", "not supported"),
        ("mamba", "not supported"),
    ],
)
def test_other_model_types_are_refused_by_name_with_what_exists(model_type: str, words: str) -> None:
    class Stub:
        config = AutoConfig.for_model(model_type)

    with pytest.raises(UserError, match=words) as caught:
        check_architecture(Stub(), Unstructured(0.5))  # type: ignore[arg-type]
    assert model_type in str(caught.value)
    assert all(name in str(caught.value) for name in supported())


def test_a_linear_that_m_does_not_divide_is_named() -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj has 44, which 8 does not divide"):
        check_architecture(tiny.model(intermediate_size=44), NM(4, 8))
