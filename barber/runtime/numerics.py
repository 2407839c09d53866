"""NaN and infinity are found where they arise, and the device is asked about it once a block."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from barber.errors import NumericsError
from barber.runtime.distributed import Ranks
from barber.runtime.tensors import Tensor


@dataclass
class FiniteChecks:
    """Checks that were ordered and not yet looked at, named as the message should begin."""

    ranks: Ranks = field(default_factory=Ranks)
    _bad: dict[str, Tensor] = field(default_factory=dict)

    def order(self, tensors: Mapping[str, Tensor]) -> None:
        """Have tensors checked."""
        for name, tensor in tensors.items():
            lowest, highest = torch.aminmax(tensor)  # one pass; both are NaN where one number is
            bad = ~((lowest > -torch.inf) & (highest < torch.inf))
            self._bad[name] = self._bad[name] | bad if name in self._bad else bad

    def first_failed(self) -> str | None:
        """The first check that failed on any process, after one transfer for all; they are done with then."""
        if not self._bad:
            return None
        bad = self.ranks.all_reduce_sum(torch.stack(list(self._bad.values())).int()).tolist()
        names = [name for name, number in zip(self._bad, bad, strict=True) if number]
        self._bad.clear()
        return names[0] if names else None

    def require(self) -> None:
        """Stop at the first check that failed.

        Raises:
            NumericsError: naming the tensor.
        """
        if (name := self.first_failed()) is not None:
            raise NumericsError(f"{name} is NaN or infinite")
