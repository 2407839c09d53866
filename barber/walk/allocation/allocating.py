"""An allocation and what it works with."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from barber.methods.patterns import Exactly, Unstructured
from barber.model.weights import InMemory, Weights
from barber.runtime.activations import ActivationStore, Place
from barber.runtime.distributed import Ranks
from barber.runtime.precision import Precision
from barber.runtime.tensors import Tensor
from barber.walk.allocation.base import Allocation, Setting, Watch
from barber.walk.sizes import fitting_batch_size


@dataclass(frozen=True)
class Allocating:
    """How sparse the linears of a model become, and with what that is found out.

    Args:
        pattern: the sparsity of all of them together.
        device, batch_size, precision, activations, scratch: as in `Pruning`.
        left_out: linears that stay dense, by name.
    """

    allocation: Allocation
    pattern: Unstructured
    device: torch.device
    batch_size: int | None = None
    precision: Precision = field(default_factory=Precision)
    activations: Place = "auto"
    scratch: Path | None = None
    left_out: frozenset[str] = frozenset()

    def carry_out(
        self, model: PreTrainedModel, tokens_NL: Tensor, weights: Weights | None = None, watch: Watch | None = None
    ) -> dict[str, Exactly]:
        """The pattern of every linear that is not left out; together they are exact to one weight.

        Args:
            tokens_NL: calibration samples, integer token ids, of all processes.
            weights: where the layers' weights are; None: in the model.
            watch: told how much is done, and of how much.

        Raises:
            NumericsError: NaN or infinite activations.
        """
        forward, _ = self.precision.on(self.device)
        setting = Setting(
            model,
            tokens_NL.long(),
            weights or InMemory(model),
            self.device,
            self.batch_size or fitting_batch_size(model.config, tokens_NL.shape[1], self.device),
            ActivationStore(self.activations, self.device, forward.dtype, self.scratch),
            forward,
            self.pattern.sparsity,
            Ranks.present(),
            self.left_out,
        )
        return {name: Exactly(count) for name, count in self.allocation.allocate(setting, watch).items()}
