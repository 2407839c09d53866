"""Granite: LLaMA with multipliers on embeddings, attention, residuals and logits."""

from barber.model.families.llama import FAMILY as FAMILY
