"""Phi 3 and 4: LLaMA with q, k, v in one linear and gate, up in another."""

from barber.model.families.llama import FAMILY as FAMILY
