"""Perplexity of a text, as the pruning papers report it."""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from barber.errors import NumericsError
from barber.evals.forward import Batch
from barber.evals.results import PerplexityResult
from barber.evals.windows import Windows
from barber.runtime.tensors import Tensor


@dataclass
class Perplexity:
    """exp(mean over the scored tokens of their cross-entropy), in natural logarithms.

    Without overlap every window scores its seqlen - 1 next tokens, so this is the papers' mean over windows.
    """

    windows: Windows
    nll: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Take in a batch of windows."""
        numbers = range(batch.windows.start, batch.windows.stop)
        for number, tokens_L, logits_LV in zip(numbers, batch.tokens_BL, batch.logits_BLV, strict=True):
            scored = self.windows.scored(number)
            targets = tokens_L[scored.start + 1 : scored.stop + 1]
            self.nll.append(functional.cross_entropy(logits_LV[scored].float(), targets))
            self.tokens.append(len(targets))

    def result(self) -> PerplexityResult:
        """The perplexity, its standard error over windows, and the protocol.

        Raises:
            NumericsError: a loss is NaN or infinite.
        """
        nll_N = torch.stack(self.nll).double().cpu()
        if not nll_N.isfinite().all():
            raise NumericsError("the evaluated model's loss is NaN or infinite")
        weight_N = torch.tensor(self.tokens, dtype=torch.float64)
        nll = ((nll_N * weight_N).sum() / weight_N.sum()).item()
        error = (nll_N.std() / len(nll_N) ** 0.5).item() if len(nll_N) > 1 else None
        # above that the exponential overflows; the loss still tells models apart
        perplexity = math.exp(nll) if nll < 700 else None
        return PerplexityResult(
            perplexity=perplexity,
            perplexity_standard_error=None if perplexity is None or error is None else perplexity * error,
            nll_per_token=nll,
            nll_standard_error=error,
            windows=len(self.nll),
            tokens=sum(self.tokens),
            protocol=self.windows.protocol,
            digest=self.windows.digest,
        )
