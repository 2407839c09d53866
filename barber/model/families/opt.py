"""OPT: plain MLP whose linears stand in the layer itself; norms before the blocks, in OPT-350m after them."""

from barber.model.families import Family

FAMILY = Family(layers="model.decoder.layers", attention=("self_attn",), mlp=("fc1", "activation_fn", "fc2"))
