"""Qwen 1.5 to 2.5: LLaMA with biases on q, k and v."""

from barber.model.families.llama import FAMILY as FAMILY
