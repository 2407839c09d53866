"""Phi 1 to 2: attention and MLP in parallel, from one norm."""

from barber.model.families.llama import FAMILY as FAMILY
