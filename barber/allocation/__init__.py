"""How many weights each linear loses, where not all lose the same share. One file a method."""

from barber.allocation.base import Allocation, Setting, Watch
from barber.allocation.error import ErrorCurves
from barber.allocation.evopress import EvoPress
from barber.allocation.owl import OWL

__all__ = ["OWL", "Allocation", "ErrorCurves", "EvoPress", "Setting", "Watch"]
