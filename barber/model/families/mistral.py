"""Mistral: LLaMA with sliding-window attention."""

from barber.model.families.llama import FAMILY as FAMILY
