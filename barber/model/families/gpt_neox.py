"""GPT-NeoX and Pythia: attention and MLP in parallel, each from a norm of its own."""

from barber.model.families import Family

FAMILY = Family(
    layers="gpt_neox.layers",
    attention=("attention",),
    mlp=("mlp",),
    stored_as={"lm_head.weight": "embed_out.weight"},
)
