"""Command R: attention and MLP in parallel, from one norm."""

from barber.families.llama import FAMILY as FAMILY
