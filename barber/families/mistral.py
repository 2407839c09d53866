"""Mistral: LLaMA with sliding-window attention."""

from barber.families.llama import FAMILY as FAMILY
