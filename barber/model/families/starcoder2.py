"""StarCoder 2: LLaMA with layer norms and a plain MLP."""

from dataclasses import replace

from barber.model.families.llama import ATTENTION
from barber.model.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, roles=ATTENTION | {"mlp.c_fc": "up", "mlp.c_proj": "down"})
