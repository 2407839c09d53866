"""Rebuilding a mask, block by block. One file a method."""

from barber.rebuild.barber import Barber

__all__ = ["Barber"]
