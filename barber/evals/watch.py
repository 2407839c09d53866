"""How a measurement is followed."""

from collections.abc import Callable
from typing import Protocol


class Watch(Protocol):
    """Whoever wants to see how a measurement goes."""

    def __call__(self, what: str, steps: int) -> Callable[[int], None]:
        """Something of so many steps begins; what is returned is called with the steps as they are done."""
        ...
