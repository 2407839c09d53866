"""Gemma 2: norms before and after each block, sliding and full attention taking turns."""

from barber.families.llama import FAMILY as FAMILY
