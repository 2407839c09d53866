"""How far a pruned model is from the dense one on the same windows: a finer yardstick than perplexity.

The dense model is gone once the walk has pruned it. What its last decoder layer gave is kept: the norm and the head
after it are never pruned, so they turn it into the dense model's logits again, at a fraction of a forward pass.
"""

from dataclasses import dataclass, field

import torch

from barber.errors import NumericsError, require_counts
from barber.evals.forward import Batch, BlockOutputs
from barber.evals.results import AgreementResult
from barber.evals.windows import Windows
from barber.model.decoder import Decoder
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class Agreement:
    """Agreement with the dense model.

    Args:
        block_positions: at how many positions, spread evenly over all windows, the blocks' outputs are compared.
    """

    block_positions: int = 512

    def __post_init__(self) -> None:
        require_counts(self, "block_positions")

    def outputs(self, windows: Windows) -> BlockOutputs:
        """What is to be taken down of the blocks on these windows."""
        total = windows.tokens_NL.numel()
        count = min(self.block_positions, total)
        return BlockOutputs((torch.arange(count) * total) // count)


@dataclass
class Reference:
    """What is kept of the dense model on the windows of a text.

    Args:
        num_windows: how many windows there are.
        hidden_NLD: the output of its last decoder layer, in its dtype; empty until the first batch tells the size.
        blocks: the outputs of its blocks, (P, D) each.
    """

    num_windows: int
    hidden_NLD: Tensor = field(default_factory=lambda: torch.empty(0))
    blocks: dict[str, Tensor] = field(default_factory=dict)

    def add(self, batch: Batch) -> None:
        """Take in a batch of windows of the dense model."""
        if not self.hidden_NLD.numel():  # one tensor for all batches: joined later they would be there twice
            hidden_BLD = batch.hidden_BLD
            self.hidden_NLD = hidden_BLD.new_empty((self.num_windows, *hidden_BLD.shape[1:]), device="cpu")
        self.hidden_NLD[batch.windows] = batch.hidden_BLD.cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Everything in one dict, to be saved."""
        return {"hidden": self.hidden_NLD, **{f"block.{name}": y for name, y in self.blocks.items()}}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Reference":
        """The inverse of `tensors`."""
        blocks = {key.removeprefix("block."): y for key, y in tensors.items() if key != "hidden"}
        return cls(len(tensors["hidden"]), tensors["hidden"], blocks)


@dataclass
class Divergence:
    """KL(dense || pruned) of the next-token distributions, and how often both find the same token the likeliest."""

    windows: Windows
    decoder: Decoder
    reference: Reference
    kl: list[Tensor] = field(default_factory=list)
    top1: list[Tensor] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Take in a batch of windows of the pruned model."""
        hidden_BLD = self.reference.hidden_NLD[batch.windows].to(batch.hidden_BLD)
        dense_BLV = self.decoder.logits(batch.tokens_BL, hidden_BLD)
        numbers = range(batch.windows.start, batch.windows.stop)
        for number, dense_LV, sparse_LV in zip(numbers, dense_BLV, batch.logits_BLV, strict=True):
            scored = self.windows.scored(number)
            p_LV, q_LV = (logits[scored].float().log_softmax(dim=-1) for logits in (dense_LV, sparse_LV))
            self.kl.append((p_LV.exp() * (p_LV - q_LV)).sum(dim=-1).mean())
            self.top1.append((p_LV.argmax(dim=-1) == q_LV.argmax(dim=-1)).float().mean())

    def result(self, blocks: dict[str, Tensor]) -> AgreementResult:
        """The means over the scored tokens, their standard errors over windows, and every block's error.

        For the blocks' errors each model runs on its own activations.

        Raises:
            NumericsError: a divergence is NaN or infinite.
        """
        if not torch.stack(self.kl).isfinite().all():
            raise NumericsError("the evaluated model's divergence from the dense one is NaN or infinite")
        weight_N = torch.tensor(
            [scored.stop - scored.start for scored in map(self.windows.scored, range(len(self.kl)))]
        )
        kl, kl_error = _mean(torch.stack(self.kl), weight_N)
        top1, top1_error = _mean(torch.stack(self.top1), weight_N)
        return AgreementResult(
            kl_divergence=kl,
            kl_standard_error=kl_error,
            top1_agreement=top1,
            top1_standard_error=top1_error,
            block_errors={name: _relative_error(y, self.reference.blocks[name]) for name, y in blocks.items()},
            block_positions=len(next(iter(blocks.values()))),
            windows=len(self.kl),
            tokens=int(weight_N.sum()),
            protocol=self.windows.protocol,
            digest=self.windows.digest,
        )


def _mean(value_N: Tensor, weight_N: Tensor) -> tuple[float, float | None]:
    value_N = value_N.double().cpu()
    error = (value_N.std() / len(value_N) ** 0.5).item() if len(value_N) > 1 else None
    return ((value_N * weight_N).sum() / weight_N.sum()).item(), error


def _relative_error(y_PD: Tensor, dense_PD: Tensor) -> float | None:
    distance = (y_PD.double() - dense_PD.double()).square().sum().item()
    size = dense_PD.double().square().sum().item()
    return distance / size if size else None
