"""Rebuilding a mask, block by block. One file a method."""

from barber.rebuild.barber import Barber
from barber.rebuild.base import Evidence, Needs, Rebuild, Rebuilt
from barber.rebuild.dsnot import DSnoT
from barber.rebuild.swaps import Swaps

__all__ = ["Barber", "DSnoT", "Evidence", "Needs", "Rebuild", "Rebuilt", "Swaps"]
