"""The calibration set: the samples of token ids that all statistics are taken over."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from barber.errors import UserError
from barber.tensors import Tensor
from barber.texts import OfflineText, Text, TextFiles, read_token_file


@dataclass(frozen=True)
class CalibrationSet:
    """Samples and where they come from.

    Args:
        tokens_NL: token ids, int64.
        source: where they come from, in words.
        seed: seed of the sampling; None where nothing was drawn.
    """

    tokens_NL: Tensor
    source: str
    seed: int | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the shape and the ids, so that two runs can be told to have used the same samples."""
        shape = str(tuple(self.tokens_NL.shape)).encode()
        return hashlib.sha256(shape + self.tokens_NL.contiguous().numpy().tobytes()).hexdigest()


class Calibration(Protocol):
    """A way to come by a calibration set."""

    def sample(self, tokenizer: PreTrainedTokenizerBase | None) -> CalibrationSet:
        """Draw or read the samples."""
        ...


@dataclass(frozen=True)
class TextWindows:
    """Windows of a text at random places: the text is tokenised whole, every start is as likely as any other.

    Args:
        text: the text.
        nsamples: number of windows.
        seqlen: tokens of a window.
        seed: seed of the drawing, independent of every other.
    """

    text: Text
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.nsamples < 1:
            raise UserError(f"must be at least 1, not {self.nsamples}", field="nsamples")
        if self.seqlen < 2:
            raise UserError(f"must be at least 2, not {self.seqlen}", field="seqlen")

    def sample(self, tokenizer: PreTrainedTokenizerBase | None) -> CalibrationSet:
        tokens_T = self.text.tokens(tokenizer)
        if len(tokens_T) < self.seqlen:
            raise UserError(
                f"must be at most {len(tokens_T)}, the tokens of the text ({self.text}), not {self.seqlen}",
                field="seqlen",
            )
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(len(tokens_T) - self.seqlen + 1, (self.nsamples,), generator=generator)
        tokens_NL = torch.stack([tokens_T[start : start + self.seqlen] for start in starts.tolist()])
        return CalibrationSet(tokens_NL, str(self.text), self.seed)


@dataclass(frozen=True)
class TokenSamples:
    """The samples of a safetensors file: token ids [B, L], int32 or int64, under the key `tokens`.

    Args:
        path: the file.
        nsamples: how many of its samples to take, from the first; None: all.
    """

    path: str
    nsamples: int | None = None

    def __post_init__(self) -> None:
        if self.nsamples is not None and self.nsamples < 1:
            raise UserError(f"must be at least 1, not {self.nsamples}", field="nsamples")

    def sample(self, tokenizer: PreTrainedTokenizerBase | None) -> CalibrationSet:
        tokens_NL = read_token_file(self.path)
        shape = list(tokens_NL.shape)
        if tokens_NL.ndim != 2 or min(shape) < 1:
            raise UserError(f"must hold 'tokens' of shape [samples, tokens]; {self.path} has {shape}", field="path")
        if shape[1] < 2:
            raise UserError(f"must hold samples of at least 2 tokens; {self.path} has {shape}", field="path")
        if self.nsamples is not None and self.nsamples > shape[0]:
            raise UserError(f"must be at most {shape[0]}, the samples of {self.path}", field="nsamples")
        return CalibrationSet(tokens_NL[: self.nsamples], f"token ids of {self.path}")


def offline(nsamples: int = 128, seqlen: int = 2048, seed: int = 0) -> TextWindows:
    """Windows of the Wikipedia articles that need no download."""
    return TextWindows(OfflineText("calibration"), nsamples, seqlen, seed)


def text(path: str, nsamples: int = 128, seqlen: int = 2048, seed: int = 0) -> TextWindows:
    """Windows of the user's own text files."""
    return TextWindows(TextFiles(path), nsamples, seqlen, seed)
