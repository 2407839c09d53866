"""Gemma 2: norms before and after each block, sliding and full attention taking turns."""

from barber.model.families.llama import FAMILY as FAMILY
