"""Rebuilding a mask, block by block. One file a method."""

from barber.methods.rebuild.barber import Barber
from barber.methods.rebuild.base import Evidence, Needs, Rebuild, Rebuilt
from barber.methods.rebuild.dsnot import DSnoT
from barber.methods.rebuild.swaps import Swaps

__all__ = ["Barber", "DSnoT", "Evidence", "Needs", "Rebuild", "Rebuilt", "Swaps"]
