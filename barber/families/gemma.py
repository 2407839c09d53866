"""Gemma 1: LLaMA with its own norm and activation."""

from barber.families.llama import FAMILY as FAMILY
