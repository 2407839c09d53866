"""EXAONE 4: norms after each block, sliding and full attention taking turns."""

from barber.model.families.olmo2 import FAMILY as FAMILY
