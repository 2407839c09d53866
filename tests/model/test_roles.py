"""Roles as views of weights, and descriptions that no family of today needs: other blocks, experts, what is kept."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from barber import Barber, Magnitude, Report, Unstructured, UserError, Wanda, prune
from barber.model.decoder import Decoder
from barber.model.families import Family, Heads, Roles
from barber.model.families.llama import FAMILY as LLAMA
from barber.model.families.opt import FAMILY as OPT
from barber.model.roles import part
from tests import tiny


def described(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model be of this family."""
    for place in ("barber.model.decoder", "barber.walk.arguments"):
        monkeypatch.setattr(f"{place}.family_of", lambda config: family)


def pruned(model: PreTrainedModel, **options: object) -> Report:
    settings = {"pattern": Unstructured(0.5), "pruner": Wanda(), "rebuild": Barber(alpha=0.3)}
    return prune(model, tiny.tokens(), **(settings | options))  # type: ignore[arg-type]


def made(model_type: str, **settings: object) -> PreTrainedModel:
    """A random model of a type that has no family."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **tiny.WIDTHS | settings)).eval()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "llama"])
def test_the_units_of_all_roles_are_every_weight_once(name: str) -> None:
    for block in Decoder(tiny.model(name)).layers[0].blocks:
        for linear in block.linears:
            linear.weight_OI.zero_()
            for role in linear.roles:
                found = part(block, role)
                assert found is not None
                weight_URI = found.by_unit(linear.weight_OI)
                assert len(weight_URI) == (block.heads.groups if block.name == "attention" else found.units)
                for unit in range(found.units):
                    weight_URI[unit] += 1  # a view: it lands in the model
            assert (linear.module.weight == 1).all()


def test_rows_of_a_role_have_numbers() -> None:
    attention = Decoder(tiny.model("gpt_neox")).layers[0].blocks[0]
    value = part(attention, "value")
    assert value is not None
    rows_UR = value.by_unit(torch.arange(96))
    assert rows_UR.tolist() == [list(range(24 * head + 16, 24 * head + 24)) for head in range(4)]
    assert part(attention, "gate") is None


def test_heads_that_do_not_fit_the_linear_are_a_mistake_only_where_they_are_asked_for() -> None:
    model = tiny.model()
    model.config.head_dim = 7
    block = Decoder(model).layers[0].blocks[0]
    assert block.heads == Heads(queries=4, groups=2, dim=7)
    with pytest.raises(UserError, match=r"0\.self_attn\.k_proj has 16 rows, which Heads\(queries=4, groups=2, dim=7\)"):
        part(block, "key")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"roles": {"self_atn.q_proj": "query"}}, "inside of one of the family's blocks, not self_atn.q_proj"),
        ({"never": ("lm_head",)}, "inside of one of the family's blocks, not lm_head"),
        ({"roles": {"self_attn.q_proj": "queries"}}, "not queries"),
        ({"norms": {"mpl": "post_attention_layernorm"}}, "those of attention, mlp, not of mpl"),
        ({"interleaved": ("self_attn.q_proj",)}, "with several roles, not self_attn.q_proj"),
    ],
)
def test_a_description_that_does_not_fit_together_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(LLAMA, **changes)  # type: ignore[arg-type]


def test_a_layer_of_one_block_leaves_the_rest_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    described(Family("model.layers", {"mlp": ("mlp",)}), monkeypatch)
    model, dense = tiny.model(), tiny.model().state_dict()
    report = pruned(model)
    assert [(block.layer, block.block) for block in report.blocks] == [(0, "mlp"), (1, "mlp")]
    assert report.exchanges > 0
    for name, weight in model.state_dict().items():
        if name in {f"{linear}.weight" for linear in report.linears}:
            assert (weight == 0).sum() == weight.numel() // 2
        else:
            assert torch.equal(weight, dense[name])


def test_a_layer_of_three_blocks_is_rebuilt_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    two, three = (tiny.model("opt", ffn_dim=32) for _ in range(2))
    pruned(two, rebuild=None)
    blocks = {"attention": ("self_attn",), "up": ("fc1", "activation_fn"), "down": ("fc2",)}
    described(replace(OPT, blocks=blocks, norms={}), monkeypatch)
    pruned(three, rebuild=None)
    assert all(torch.equal(two.state_dict()[name], weight) for name, weight in three.state_dict().items())
    report = pruned(tiny.model("opt", ffn_dim=32))
    assert [block.block for block in report.blocks] == [*blocks] * 2
    assert all(block.exchanges > 0 and block.sparsity == 0.5 for block in report.blocks)


def test_layers_may_differ_in_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # LFM 2: a short convolution in place of the attention of the first layer.
    family = Family(
        layers="model.layers",
        blocks={"attention": ("self_attn",), "mlp": ("feed_forward",)},
        roles={"feed_forward.w1": "gate", "feed_forward.w3": "up", "feed_forward.w2": "down"},
        norms={"attention": "operator_norm", "mlp": "ffn_norm"},
    )
    described(family, monkeypatch)
    model = made("lfm2", layer_types=["conv", "full_attention"])
    layers = Decoder(model).layers
    assert [[block.name for block in layer.blocks] for layer in layers] == [["mlp"], ["attention", "mlp"]]
    assert layers[0].blocks[0].norm is layers[0].module.ffn_norm
    report = pruned(model)
    assert [(block.layer, block.block) for block in report.blocks] == [(0, "mlp"), (1, "attention"), (1, "mlp")]
    assert report.sparsity == 0.5


def test_what_a_family_says_is_never_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    # Qwen 2 MoE: a dense layer and one with experts; the gate of its shared expert is a plain linear.
    shared: Roles = {
        "mlp.shared_expert.gate_proj": "shared_gate",
        "mlp.shared_expert.up_proj": "shared_up",
        "mlp.shared_expert.down_proj": "shared_down",
    }
    experts: Roles = {"mlp.gate": "router", "mlp.experts": "experts"}
    family = replace(LLAMA, roles=LLAMA.roles | experts | shared, never=("mlp.shared_expert_gate",))
    described(family, monkeypatch)
    widths = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    model = made("qwen2_moe", **widths, mlp_only_layers=[0])
    dense = {name: value.clone() for name, value in model.state_dict().items()}

    first, second = (layer.blocks[1] for layer in Decoder(model).layers)
    assert [linear.roles for linear in first.linears] == [("gate",), ("up",), ("down",)]
    assert [linear.roles for linear in second.linears] == [("shared_gate",), ("shared_up",), ("shared_down",)]
    assert second.others == {"router": second.modules[0].gate, "experts": second.modules[0].experts}
    down = part(second, "shared_down")
    assert down is not None
    assert down.by_unit(down.linear.weight_OI).shape == (24, 32, 1)

    report = pruned(model, pruner=Magnitude(), rebuild=None)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, dense[name])}
    assert changed == {f"{name}.weight" for name in report.linears}
    assert not any("shared_expert_gate" in name for name in changed)


def test_a_router_that_is_a_linear_is_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    described(replace(LLAMA, roles={"mlp.router": "router", "mlp.experts": "experts"}), monkeypatch)
    model = made("phimoe", num_local_experts=4)
    mlp = Decoder(model).layers[0].blocks[1]
    assert isinstance(mlp.others["router"], torch.nn.Linear)
    assert mlp.linears == []
