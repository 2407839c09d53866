"""Perplexity on a text, as the pruning papers report it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.errors import NumericsError, UserError, within
from barber.tensors import Tensor, batches
from barber.texts import Text

Stage = Literal["dense", "pruned", "rebuilt"]


@dataclass(frozen=True)
class Perplexity:
    """The text is tokenised whole and cut into windows of `seqlen` tokens, without overlap, the rest dropped.

    Per window the mean cross-entropy of its seqlen - 1 next tokens; perplexity = exp(mean over windows).

    Args:
        text: the text.
        seqlen: tokens of a window.
        max_windows: take the first so many windows; None: all. A limit makes figures incomparable, it is recorded.
        batch_size: windows that go through the model together.
        stages: which models are measured: dense, with the initial mask (pruned), with the rebuilt one.
    """

    text: Text
    seqlen: int = 2048
    max_windows: int | None = None
    batch_size: int = 4
    stages: Sequence[Stage] = ("dense", "pruned", "rebuilt")

    def __post_init__(self) -> None:
        if self.seqlen < 2:
            raise UserError(f"must be at least 2, not {self.seqlen}", field="seqlen")
        for name in ("max_windows", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"must be at least 1, not {value}", field=name)

    def windows(self, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        """The windows, (N, L) int64.

        Raises:
            UserError: the text is shorter than one window.
        """
        with within("text"):
            tokens_T = self.text.tokens(tokenizer)
        count = len(tokens_T) // self.seqlen
        if count == 0:
            raise UserError(
                f"must be at most {len(tokens_T)}, the tokens of the text ({self.text}), not {self.seqlen}",
                field="seqlen",
            )
        return tokens_T[: count * self.seqlen].view(count, self.seqlen)[: self.max_windows]

    def evaluate(
        self,
        model: PreTrainedModel,
        windows_NL: Tensor,
        device: torch.device,
        progress: Callable[[int], None] = lambda windows: None,
    ) -> dict[str, float | int | str | None]:
        """Measure a model that is on `device`; `progress` is told the number of windows of every finished batch."""
        losses_N = []
        with torch.inference_mode():
            for batch in batches(len(windows_NL), self.batch_size):
                losses_N.append(_window_losses(model, windows_NL[batch].to(device)))
                progress(len(losses_N[-1]))
        loss_N = torch.cat(losses_N).double()
        if not loss_N.isfinite().all():
            raise NumericsError("the evaluated model's loss is NaN or infinite")
        loss = loss_N.mean().item()
        return {
            # above that the exponential overflows; the loss still tells models apart
            "perplexity": math.exp(loss) if loss < 700 else None,
            "nll_per_token": loss,
            "nll_standard_error": (loss_N.std() / len(loss_N) ** 0.5).item() if len(loss_N) > 1 else None,
            "windows": len(loss_N),
            "seqlen": self.seqlen,
            "max_windows": self.max_windows,
            "text": str(self.text),
        }


def _window_losses(model: PreTrainedModel, tokens_BL: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens of every window: (B,), float32."""
    logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits
    losses = [
        functional.cross_entropy(logits_LV[:-1].float(), tokens_L[1:])
        for logits_LV, tokens_L in zip(logits_BLV, tokens_BL, strict=True)
    ]
    return torch.stack(losses)
