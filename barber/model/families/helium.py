"""Helium: LLaMA with norms of its own."""

from barber.model.families.llama import FAMILY as FAMILY
