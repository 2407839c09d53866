"""GPT-NeoX and Pythia: attention and MLP in parallel, each from a norm of its own."""

from barber.model.families import Family

FAMILY = Family(
    layers="gpt_neox.layers",
    blocks={"attention": ("attention",), "mlp": ("mlp",)},
    roles={
        "attention.query_key_value": ("query", "key", "value"),
        "attention.dense": "output",
        "mlp.dense_h_to_4h": "up",
        "mlp.dense_4h_to_h": "down",
    },
    interleaved=("attention.query_key_value",),
    norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    groups="num_attention_heads",
    stored_as={"lm_head.weight": "embed_out.weight"},
)
