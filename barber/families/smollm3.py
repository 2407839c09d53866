"""SmolLM 3: LLaMA with some layers without positions."""

from barber.families.llama import FAMILY as FAMILY
