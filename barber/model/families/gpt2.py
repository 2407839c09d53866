"""GPT-2: linears with transposed weights (Conv1D), q, k and v in one of them."""

from barber.model.families import Family

FAMILY = Family(
    layers="transformer.h",
    blocks={"attention": ("attn",), "mlp": ("mlp",)},
    roles={
        "attn.c_attn": ("query", "key", "value"),
        "attn.c_proj": "output",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    },
    norms={"attention": "ln_1", "mlp": "ln_2"},
    groups="num_attention_heads",
)
