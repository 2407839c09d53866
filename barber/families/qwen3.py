"""Qwen 3: LLaMA with norms on queries and keys."""

from barber.families.llama import FAMILY as FAMILY
