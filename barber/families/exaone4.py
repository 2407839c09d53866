"""EXAONE 4: norms after each block, sliding and full attention taking turns."""

from barber.families.llama import FAMILY as FAMILY
