"""OLMo 3: OLMo 2 with sliding and full attention taking turns."""

from barber.families.llama import FAMILY as FAMILY
