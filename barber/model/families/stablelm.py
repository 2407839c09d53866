"""StableLM: LLaMA with layer norms and partly rotary positions; optionally attention and MLP in parallel."""

from barber.model.families.llama import FAMILY as FAMILY
