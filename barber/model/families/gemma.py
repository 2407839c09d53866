"""Gemma 1: LLaMA with its own norm and activation."""

from barber.model.families.llama import FAMILY as FAMILY
