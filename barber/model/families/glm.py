"""GLM 4 (dense): LLaMA with partly rotary positions and gate, up in one linear."""

from barber.model.families.llama import FAMILY as FAMILY
