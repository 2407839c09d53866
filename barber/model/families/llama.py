"""LLaMA 1 to 3 and its many look-alikes: pre-norm, rotary positions, gated MLP."""

from barber.model.families import Family

FAMILY = Family(layers="model.layers", attention=("self_attn",), mlp=("mlp",))
