"""Every supported family: the walk sees what the model itself computes, prunes exactly, and the result reloads.

Families whose data are another's have two tests each; what more there is to see is seen once a description.
"""

from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from barber import NM, Barber, Magnitude, SparseGPT, Unstructured, UserError, Wanda, prune
from barber.model.blocks import Block, Layer, main_output
from barber.model.decoder import Decoder, LayerInputs
from barber.model.driver import Stream
from barber.model.families import Role, family_of, supported
from barber.model.roles import part
from barber.runtime.activations import ActivationStore
from barber.walk.checks import check_architecture
from tests import tiny

NAMES = list(tiny.CONFIGS)
CPU = torch.device("cpu")
STORE = ActivationStore("device", CPU, torch.float32)
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
NOTHING_TO_FOLD = {"exaone4", "olmo2", "olmo3", "opt/post-norm"}  # norms after the blocks


def test_every_family_file_has_a_tiny_model() -> None:
    assert {name.split("/")[0] for name in NAMES} == set(supported())


def test_the_page_of_families_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert run_path(str(PAGE.with_suffix(".py")))["filled"](page) == page, "run python docs/families.py"


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_roles_are_what_the_model_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_NL = tiny.model(name), tiny.tokens(num_samples=5)
    decoder = Decoder(model)
    inputs = decoder.inputs(tokens_NL, batch_size=2, store=STORE)  # batches of 2, 2 and 1
    check_hidden_states(model, decoder, inputs, tokens_NL)
    for index, layer in enumerate(decoder.layers):
        check_every_linear_is_in_one_block(layer)
        check_blocks_make_the_layer(layer, inputs, index)
        for block in layer.blocks:
            assert (block.norm is None) == (name in NOTHING_TO_FOLD)
        check_attention(model, layer, inputs, index, monkeypatch)
        check_mlp(model, layer, inputs, index)
    found = {role for linear in decoder.linears for role in linear.roles}
    assert all(linear.roles for linear in decoder.linears)
    assert found == {role for path in family_of(model.config).roles for role in family_of(model.config).roles_of(path)}


def check_hidden_states(model: PreTrainedModel, decoder: Decoder, inputs: LayerInputs, tokens_NL: torch.Tensor) -> None:
    """What goes from layer to layer in the walk is what does in the model."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.module.register_forward_hook(lambda _, __, output: seen.append(main_output(output)))
        for layer in decoder.layers
    ]
    with torch.no_grad():
        model(tokens_NL, use_cache=False)
    for hook in hooks:
        hook.remove()
    hidden_BLD = inputs.hidden[slice(None)].clone()
    stream = Stream(inputs, inputs.hidden, batch_size=2)
    for index, layer in enumerate(decoder.layers):
        with layer.onloaded(CPU), torch.no_grad():
            for batch, call in stream.calls(index):
                stream.hidden[batch] = layer.run(call)
        torch.testing.assert_close(stream.hidden[slice(None)], seen[index], rtol=1e-5, atol=1e-6)
    inputs.hidden[slice(None)] = hidden_BLD


def check_every_linear_is_in_one_block(layer: Layer) -> None:
    inside = {id(module) for module in layer.module.modules() if getattr(module, "weight", None) is not None}
    matrices = {key for key in inside if any(id(m) == key and m.weight.ndim == 2 for m in layer.module.modules())}
    assert {id(linear.module) for linear in layer.linears} == matrices
    assert len(layer.linears) == len(matrices)


def check_blocks_make_the_layer(layer: Layer, inputs: LayerInputs, index: int) -> None:
    """The blocks put together are the layer, and each is fed what the norm that its family names gives."""
    call = inputs.call(index, inputs.hidden[slice(0, 2)])
    done: list[torch.Tensor] = []
    given: dict[int, torch.Tensor] = {}
    norms = {id(block.norm): block.norm for block in layer.blocks if block.norm is not None}
    hooks = [
        norm.register_forward_hook(lambda module, _, output: given.update({id(module): output}))
        for norm in norms.values()
    ]
    with torch.no_grad():
        for position, block in enumerate(layer.blocks):
            block_call, output = layer.run_block(position, call, done)
            torch.testing.assert_close(block.run(block_call), output, rtol=0, atol=0)
            if block.norm is not None:
                assert torch.equal(block_call.x, given[id(block.norm)])
            done.append(output.view_as(call.x))  # OPT's MLP gives the tokens of all samples in one row
        torch.testing.assert_close(layer.finish(call, done), layer.run(call), rtol=0, atol=0)
        for hook in hooks:
            hook.remove()
        # With all blocks' outputs known, what the norms give makes no difference: nothing else is fed by them.
        expected_BLD = layer.finish(call, done)
        silenced = [norm.register_forward_hook(lambda _, __, output: output * 0) for norm in norms.values()]
        assert torch.equal(layer.finish(call, done), expected_BLD)
        for hook in silenced:
            hook.remove()


def by_unit(block: Block, role: Role, x_BLI: torch.Tensor) -> torch.Tensor:
    """What the rows of a role make of an input, unit by unit: (B, L, U, rows of a unit)."""
    found = part(block, role)
    assert found is not None
    y_BLUR = torch.einsum("bli,uri->blur", x_BLI, found.by_unit(found.linear.weight_OI))
    bias = found.linear.module.bias
    return y_BLUR if bias is None else y_BLUR + found.by_unit(bias)


def taken_up(block: Block, role: Role, x_BLUC: torch.Tensor) -> torch.Tensor:
    """What the columns of a role make of what comes unit by unit."""
    found = part(block, role)
    assert found is not None
    y_BLO = torch.einsum("bluc,uoc->blo", x_BLUC, found.by_unit(found.linear.weight_OI))
    bias = found.linear.module.bias
    return y_BLO if bias is None else y_BLO + bias


def check_attention(
    model: PreTrainedModel, layer: Layer, inputs: LayerInputs, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values by role are what attention is computed of, and what it gives is taken up as by role.

    Queries and keys are compared at a sample's first token, which rotary positions do not turn. The attention itself
    is made up.
    """
    seen: dict[str, Any] = {}

    def spy(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(module=module, query=query, key=key, value=value, output=query.transpose(1, 2).contiguous())
        return seen["output"], None

    block = layer.blocks[0]
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setitem(ALL_ATTENTION_FUNCTIONS, "spy", spy)
        patched.setattr(model.config, "_attn_implementation", "spy")
        call, y_BLD = layer.run_block(0, inputs.call(index, inputs.hidden[slice(0, 2)]), [])
    assert seen["query"].shape[1::2] == (block.heads.queries, block.heads.dim)
    assert seen["key"].shape[1::2] == seen["value"].shape[1::2] == (block.heads.groups, block.heads.dim)
    for role in ("query", "key", "value"):
        made = by_unit(block, role, call.x).flatten(2)
        if (norm := getattr(seen["module"], f"{role[0]}_norm", None)) is not None:  # of all heads, or of each
            made = norm(made.unflatten(2, (-1, norm.weight.numel()))).flatten(2)
        if model.config.model_type == "opt" and role == "query":
            made = made * block.heads.dim**-0.5
        if (limit := getattr(model.config, "clip_qkv", None)) is not None:
            made = made.clamp(-limit, limit)
        expected = seen[role].transpose(1, 2).flatten(2)
        tokens = slice(None) if role == "value" else slice(0, 1)
        torch.testing.assert_close(made[:, tokens], expected[:, tokens], rtol=1e-4, atol=1e-5)
    in_units = seen["output"].flatten(2).unflatten(2, (block.heads.groups, -1))
    torch.testing.assert_close(taken_up(block, "output", in_units), y_BLD, rtol=1e-4, atol=1e-5)


def check_mlp(model: PreTrainedModel, layer: Layer, inputs: LayerInputs, index: int) -> None:
    """The MLP computed from its roles is the block."""
    call = inputs.call(index, inputs.hidden[slice(0, 2)])
    with torch.no_grad():
        attended = layer.run_block(0, call, [])[1]
        block_call, y_BLD = layer.run_block(1, call, [attended])
    block, x_BLD = layer.blocks[1], block_call.x.view_as(call.x)
    named = ("hidden_activation", "hidden_act", "activation_function")
    activation = ACT2FN[next(getattr(model.config, key) for key in named if getattr(model.config, key, None))]
    inner = by_unit(block, "up", x_BLD)
    inner = activation(inner) if part(block, "gate") is None else activation(by_unit(block, "gate", x_BLD)) * inner
    torch.testing.assert_close(taken_up(block, "down", inner), y_BLD.view_as(call.x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_is_exactly_sparse_and_reloads(name: str, tmp_path: Path) -> None:
    check_pruned(name, NM(2, 4), tmp_path)


@pytest.mark.parametrize("name", tiny.DESCRIPTIONS)
def test_so_it_is_without_a_pattern(name: str, tmp_path: Path) -> None:
    check_pruned(name, Unstructured(0.5), tmp_path)


def check_pruned(name: str, pattern: Unstructured | NM, folder: Path) -> None:
    model, tokens_NL = tiny.model(name), tiny.tokens()
    report = prune(model, tokens_NL, pattern=pattern, pruner=Wanda(), rebuild=Barber(alpha=0.3))
    assert report.sparsity == 0.5
    assert report.exchanges > 0
    if isinstance(pattern, NM):
        for linear in Decoder(model).linears:
            zeros_CM = (linear.weight_OI == 0).reshape(-1, pattern.m).sum(dim=1)
            assert (zeros_CM == pattern.m - pattern.n).all(), linear.name

    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens_NL).logits, model(tokens_NL).logits)
    for before, after in zip(Decoder(model).linears, Decoder(again).linears, strict=True):
        assert torch.equal(before.weight_OI == 0, after.weight_OI == 0)


@pytest.mark.parametrize("pruner", [Magnitude(), SparseGPT()], ids=lambda pruner: type(pruner).__name__)
@pytest.mark.parametrize("name", ["gpt2", "opt/post-norm", "gpt_neox", "gemma2"])
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
