"""OLMo 1: LLaMA with norms that have no weights."""

from barber.model.families.llama import FAMILY as FAMILY
