"""OLMo 3: OLMo 2 with sliding and full attention taking turns."""

from barber.model.families.olmo2 import FAMILY as FAMILY
