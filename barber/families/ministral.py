"""Ministral: Mistral with full and sliding attention taking turns."""

from barber.families.llama import FAMILY as FAMILY
