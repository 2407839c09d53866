"""LLaMA 1 to 3 and its many look-alikes: pre-norm, rotary positions, gated MLP."""

from barber.model.families import Family, Roles

ATTENTION: Roles = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
}
MLP: Roles = {
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
FAMILY = Family(
    layers="model.layers",
    blocks={"attention": ("self_attn",), "mlp": ("mlp",)},
    roles=ATTENTION | MLP,
    norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
)
