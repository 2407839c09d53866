"""A text cut into the windows that perplexity and agreement are measured on."""

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from barber.data.texts import Corpus, Text, Tokens, leading_bos, without_leading
from barber.errors import UserError, require_counts
from barber.evals.results import TextProtocol
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class Windows:
    """The windows of a text.

    Args:
        tokens_NL: their token ids, int64.
        stride: tokens between the starts of two windows. Where windows overlap, all but the first are scored on their
            last `stride` tokens only, so that every token counts once.
        source: where the text was found.
        protocol: what the record says about the text and how the windows were made.
    """

    tokens_NL: Tensor
    stride: int
    source: str
    protocol: TextProtocol

    def scored(self, window: int) -> slice:
        """The positions of a window whose next token is scored."""
        seqlen = self.tokens_NL.shape[1]
        first = 0 if window == 0 else max(0, seqlen - self.stride - 1)
        return slice(first, seqlen - 1)

    @property
    def digest(self) -> str:
        """SHA-256 of the ids and of what of them is scored."""
        ids = self.tokens_NL.contiguous().numpy().tobytes()
        return hashlib.sha256(f"{tuple(self.tokens_NL.shape)} {self.stride}".encode() + ids).hexdigest()


@dataclass(frozen=True)
class WindowProtocol:
    """How a text becomes windows. The papers': windows of 2048 tokens without overlap, the rest dropped.

    Args:
        seqlen: tokens of a window.
        stride: tokens between the starts of two windows; None: seqlen, no overlap.
        bos: begin every window with the tokenizer's beginning-of-sequence token, which counts as one of its tokens.
            Otherwise the text as a whole begins as the tokenizer has it.
        max_windows: take the first so many windows; None: all.
    """

    seqlen: int = 2048
    stride: int | None = None
    bos: bool = False
    max_windows: int | None = None

    def __post_init__(self) -> None:
        require_counts(self, "seqlen", least=2)
        if self.stride is not None and not 1 <= self.stride <= self.seqlen:
            raise UserError(f"must be between 1 and seqlen ({self.seqlen}), not {self.stride}", field="stride")
        require_counts(self, "max_windows")

    def cut(self, text: Text, found: Tokens, tokenizer: PreTrainedTokenizerBase | None) -> Windows:
        """Cut a text, whose tokens have been found, into windows.

        Raises:
            UserError: the text is shorter than one window, or there is no BOS token.
        """
        bos_B = leading_bos(tokenizer, self.bos)
        tokens_T = without_leading(found.tokens_T, bos_B)
        content = self.seqlen - len(bos_B)
        if len(tokens_T) < content:
            raise UserError(
                f"must be at most {len(tokens_T) + len(bos_B)}, the tokens of the text ({found.source}), "
                f"not {self.seqlen}",
                field="seqlen",
            )
        stride = min(self.stride or self.seqlen, content)
        tokens_NC = tokens_T.unfold(0, content, stride)[: self._limit(text)]
        tokens_NL = torch.cat([bos_B.expand(len(tokens_NC), -1), tokens_NC], dim=1)
        return self._described(tokens_NL.contiguous(), stride, found, text)

    def _limit(self, text: Text) -> int | None:
        limits = [self.max_windows, text.max_windows if isinstance(text, Corpus) else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def _described(self, tokens_NL: Tensor, stride: int, found: Tokens, text: Text) -> Windows:
        protocol = TextProtocol(
            text=found.source,
            text_tokens=len(found.tokens_T),
            seqlen=self.seqlen,
            stride=stride,
            bos=self.bos,
            max_windows=self._limit(text),
            separator=text.separator if isinstance(text, Corpus) else None,
        )
        return Windows(tokens_NL, stride, found.source, protocol)
