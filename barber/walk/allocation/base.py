"""What an allocation of sparsity to linears is, and what it may look at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from barber.errors import UserError
from barber.methods.patterns import NM, Pattern
from barber.model.decoder import Decoder
from barber.model.driver import Driver
from barber.model.weights import Weights
from barber.runtime.activations import ActivationStore
from barber.runtime.distributed import ALONE, Ranks
from barber.runtime.precision import Arithmetic
from barber.runtime.tensors import Tensor

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Setting:
    """A dense model, what it is looked at with, and how sparse it shall become.

    Args:
        model: in evaluation mode; it is left as it was.
        tokens_NL: calibration token ids of all processes, which share the samples.
        weights: where the layers' weights are, as long as none of them is pruned.
        device: where the layers are computed, one at a time.
        batch_size: samples that go through a layer together.
        store: where activations wait, in the dtype of the arithmetic.
        arithmetic: of the matrix products.
        sparsity: the share of all weights together that goes, those of linears that are left out aside.
        ranks: the processes.
        left_out: linears that stay dense, by name.
    """

    model: PreTrainedModel
    tokens_NL: Tensor
    weights: Weights
    device: torch.device
    batch_size: int
    store: ActivationStore
    arithmetic: Arithmetic
    sparsity: float
    ranks: Ranks = ALONE
    left_out: frozenset[str] = frozenset()

    @property
    def sizes(self) -> dict[str, int]:
        """Of every linear that is to be pruned, by name and in the order of the walk, how many weights it has."""
        linears = Decoder(self.model).linears
        return {one.name: one.weight_OI.numel() for one in linears if one.name not in self.left_out}

    @property
    def total(self) -> int:
        """How many weights are to be pruned."""
        return int(sum(self.sizes.values()) * self.sparsity)

    @property
    def driver(self) -> Driver:
        """Shows the dense layers, one at a time; nothing that their linears are given is kept."""
        return Driver(self.model, self.weights, self.device, self.arithmetic)


class Allocation(Protocol):
    """A method that decides how many weights every linear loses, all of them together being given."""

    def check(self, pattern: Pattern) -> None:
        """Refuse a pattern that leaves nothing to decide.

        Raises:
            UserError: N:M.
        """
        if isinstance(pattern, NM):
            raise UserError(
                f"{pattern} stays uniform, every cell loses as many weights; "
                "choose an unstructured pattern, or allocation=uniform"
            )

    def allocate(self, setting: Setting, watch: Watch | None = None) -> dict[str, int]:
        """The number of weights that each linear loses, by name; they add up to `setting.total`.

        Args:
            watch: told how much is done, and of how much.

        Raises:
            NumericsError: NaN or infinite activations.
        """
        ...


def rounded(ideal: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers of weights that add up to `total`, none of them below 0 or above its linear's size.

    Where the ideal ones lie outside, or add up to something else, the others make up for it, in proportion to what
    they have to give. Then all are rounded down, and those that lose most by it get one back.
    """
    wanted = {name: min(max(ideal[name], 0.0), float(size)) for name, size in sizes.items()}
    present = sum(wanted.values())
    if total > present:
        share = (total - present) / (sum(sizes.values()) - present)
        wanted = {name: x + share * (sizes[name] - x) for name, x in wanted.items()}
    elif total < present:
        wanted = {name: x * total / present for name, x in wanted.items()}
    counts = {name: min(int(x), sizes[name]) for name, x in wanted.items()}
    by_loss = sorted(sizes, key=lambda name: counts[name] - wanted[name])
    while (rest := total - sum(counts.values())) > 0:
        for name in [name for name in by_loss if counts[name] < sizes[name]][:rest]:
            counts[name] += 1
    return counts
