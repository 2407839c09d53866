"""OLMo 2: norms after each block instead of before it."""

from barber.model.families.llama import FAMILY as FAMILY
