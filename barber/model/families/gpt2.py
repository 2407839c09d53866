"""GPT-2: linears with transposed weights (Conv1D), q, k and v in one of them."""

from barber.model.families import Family

FAMILY = Family(layers="transformer.h", attention=("attn",), mlp=("mlp",))
