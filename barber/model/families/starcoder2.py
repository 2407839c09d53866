"""StarCoder 2: LLaMA with layer norms and a plain MLP."""

from barber.model.families.llama import FAMILY as FAMILY
