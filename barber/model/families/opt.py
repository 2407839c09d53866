"""OPT: plain MLP whose linears stand in the layer itself; norms before the blocks, in OPT-350m after them."""

from barber.model.families import Family

FAMILY = Family(
    layers="model.decoder.layers",
    blocks={"attention": ("self_attn",), "mlp": ("fc1", "activation_fn", "fc2")},
    roles={
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.out_proj": "output",
        "fc1": "up",
        "fc2": "down",
    },
    norms={"attention": "self_attn_layer_norm", "mlp": "final_layer_norm"},
    norms_if="do_layer_norm_before",
    groups="num_attention_heads",
)
