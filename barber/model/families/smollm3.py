"""SmolLM 3: LLaMA with some layers without positions."""

from barber.model.families.llama import FAMILY as FAMILY
