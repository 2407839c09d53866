"""Ministral: Mistral with full and sliding attention taking turns."""

from barber.model.families.llama import FAMILY as FAMILY
