"""Helium: LLaMA with norms of its own."""

from barber.families.llama import FAMILY as FAMILY
