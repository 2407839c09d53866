"""OLMo 2: norms after each block instead of before it."""

from dataclasses import replace

from barber.model.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, norms={})
