"""OLMo 3: OLMo 2 with sliding and full attention taking turns."""

from barber.model.families.llama import FAMILY as FAMILY
