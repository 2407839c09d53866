"""Rebuilding a mask, block by block. One file a method."""

from barber.methods.rebuild.barber import Barber
from barber.methods.rebuild.base import Needs, Rebuild, Rebuilt
from barber.methods.rebuild.dsnot import DSnoT
from barber.methods.rebuild.swaps import Swaps

__all__ = ["Barber", "DSnoT", "Needs", "Rebuild", "Rebuilt", "Swaps"]
