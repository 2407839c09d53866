"""Gemma 3, text only: as Gemma 2, with rotary tables that differ by the layer's attention."""

from barber.model.families.gemma2 import FAMILY as FAMILY
