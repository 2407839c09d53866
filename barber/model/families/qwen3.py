"""Qwen 3: LLaMA with norms on queries and keys."""

from barber.model.families.llama import FAMILY as FAMILY
