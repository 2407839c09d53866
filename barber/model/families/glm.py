"""GLM 4 (dense): LLaMA with partly rotary positions and gate, up in one linear."""

from dataclasses import replace

from barber.model.families.llama import ATTENTION
from barber.model.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, roles=ATTENTION | {"mlp.gate_up_proj": ("gate", "up"), "mlp.down_proj": "down"})
