"""How many weights each linear loses, where not all lose the same share. One file a method."""

from barber.walk.allocation.allocating import Allocating
from barber.walk.allocation.base import Allocation, Setting, Watch
from barber.walk.allocation.error import ErrorCurves
from barber.walk.allocation.evopress import EvoPress
from barber.walk.allocation.owl import OWL

__all__ = ["OWL", "Allocating", "Allocation", "ErrorCurves", "EvoPress", "Setting", "Watch"]
