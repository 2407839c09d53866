"""The calibration set: the samples of token ids that all statistics are taken over."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from barber.data.datasets import MAX_BYTES, DataSet
from barber.data.texts import (
    Corpus,
    OfflineText,
    Text,
    TextFiles,
    digest_of_ids,
    leading_bos,
    read_token_file,
    tokenise,
    without_leading,
)
from barber.errors import UserError, require_counts
from barber.runtime.cache import Cache
from barber.runtime.files import written_whole
from barber.runtime.tensors import Tensor


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
        return digest_of_ids(self.tokens_NL)

    @property
    def distinct(self) -> int:
        """How many samples are not a repetition of another: a short text has only so many windows."""
        return len(torch.unique(self.tokens_NL, dim=0))


class Calibration(Protocol):
    """A way to come by a calibration set."""

    @property
    def save(self) -> str | None:
        """A file to keep it in."""
        ...

    def sample(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> CalibrationSet:
        """Draw or read the samples; `cache` keeps the token ids of whole texts for later runs."""
        ...


@dataclass(frozen=True)
class TextWindows:
    """Windows of a text at random places: the text is tokenised whole, every start is as likely as any other.

    Args:
        text: the text.
        nsamples: number of windows.
        seqlen: tokens of a window.
        seed: seed of the drawing, independent of every other.
        save: a safetensors file to keep the samples in, readable by `calibration=tokens`; None: nowhere.
        bos: begin every window with the tokenizer's beginning-of-sequence token, which counts as one of its tokens.
    """

    text: Text
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0
    save: str | None = None
    bos: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def sample(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> CalibrationSet:
        text = self.text.tokens(tokenizer, cache)
        bos_B = leading_bos(tokenizer, self.bos)
        tokens_T = without_leading(text.tokens_T, bos_B)
        length = self.seqlen - len(bos_B)
        if len(tokens_T) < length:
            most = len(tokens_T) + len(bos_B)
            raise UserError(
                f"must be at most {most}, the tokens of the text ({text.source}), not {self.seqlen}", field="seqlen"
            )
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(len(tokens_T) - length + 1, (self.nsamples,), generator=generator)
        windows = [torch.cat([bos_B, tokens_T[start : start + length]]) for start in starts.tolist()]
        return CalibrationSet(torch.stack(windows), text.source, self.seed)


@dataclass(frozen=True)
class DocumentWindows:
    """Windows that lie inside a document each: a random document of more than `seqlen` tokens, a random window of it.

    Args:
        data: the documents.
        nsamples: number of windows.
        seqlen: tokens of a window.
        seed: seed of the drawing, independent of every other.
        save: a safetensors file to keep the samples in, readable by `calibration=tokens`; None: nowhere.
        bos: begin every window with the tokenizer's beginning-of-sequence token, which counts as one of its tokens.
    """

    data: DataSet
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0
    save: str | None = None
    bos: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def sample(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> CalibrationSet:
        rows = self.data.rows()
        bos_B = leading_bos(tokenizer, self.bos)
        length = self.seqlen - len(bos_B)
        generator = torch.Generator().manual_seed(self.seed)
        # Documents that turned out too short are not drawn again: an endless search ends, the chances are the same.
        candidates = list(range(len(rows.texts)))
        longest = 0
        windows: list[Tensor] = []
        while len(windows) < self.nsamples:
            if not candidates:
                raise UserError(
                    f"must be below {longest + len(bos_B)}, the tokens of the longest document in {rows.source}, "
                    f"not {self.seqlen}",
                    field="seqlen",
                )
            drawn = _draw(len(candidates), generator)
            tokens_T = without_leading(tokenise(rows.texts[candidates[drawn]], tokenizer), bos_B)
            longest = max(longest, len(tokens_T))
            if len(tokens_T) <= length:
                candidates[drawn] = candidates[-1]
                candidates.pop()
                continue
            start = _draw(len(tokens_T) - length + 1, generator)
            windows.append(torch.cat([bos_B, tokens_T[start : start + length]]))
        return CalibrationSet(torch.stack(windows), rows.source, self.seed)


@dataclass(frozen=True)
class TokenSamples:
    """The samples of a safetensors file: token ids [B, L], int32 or int64, under the key `tokens`.

    Args:
        path: the file.
        nsamples: how many of its samples to take, from the first; None: all.
        seqlen: how many of a sample's tokens to take, from the first; None: all.
        save: another file to keep them in; None: nowhere.
    """

    path: str
    nsamples: int | None = None
    seqlen: int | None = None
    save: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    def sample(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> CalibrationSet:
        tokens_NL = read_token_file(self.path)
        shape = list(tokens_NL.shape)
        if tokens_NL.ndim != 2 or min(shape) < 1:
            raise UserError(f"must hold 'tokens' of shape [samples, tokens]; {self.path} has {shape}", field="path")
        if shape[1] < 2:
            raise UserError(f"must hold samples of at least 2 tokens; {self.path} has {shape}", field="path")
        if self.nsamples is not None and self.nsamples > shape[0]:
            raise UserError(f"must be at most {shape[0]}, the samples of {self.path}", field="nsamples")
        if self.seqlen is not None and self.seqlen > shape[1]:
            raise UserError(f"must be at most {shape[1]}, the tokens of a sample of {self.path}", field="seqlen")
        return CalibrationSet(tokens_NL[: self.nsamples, : self.seqlen], f"token ids of {self.path}")


def offline_windows(
    nsamples: int = 128, seqlen: int = 2048, seed: int = 0, save: str | None = None, bos: bool = False
) -> TextWindows:
    """Windows of the Wikipedia articles that need no download."""
    return TextWindows(OfflineText("calibration"), nsamples, seqlen, seed, save, bos)


def text_windows(
    path: str,
    column: str = "text",
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    save: str | None = None,
    bos: bool = False,
    max_bytes: int = MAX_BYTES,
) -> TextWindows:
    """Windows of the user's own text files; the options are those of `TextFiles` and of `TextWindows`."""
    return TextWindows(TextFiles(path, column, max_bytes), nsamples, seqlen, seed, save, bos)


def hub_windows(
    dataset: str,
    split: str = "train",
    column: str = "text",
    config: str | None = None,
    revision: str | None = None,
    files: str | None = None,
    local: Sequence[str] = (),
    data_dir: str | None = None,
    windows: Literal["document", "text"] = "document",
    separator: str = " ",
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    save: str | None = None,
    bos: bool = False,
    max_bytes: int = MAX_BYTES,
) -> TextWindows | DocumentWindows:
    """Windows of a data set of the Hugging Face hub.

    Args:
        windows: `document`: each inside one row; `text`: anywhere in the rows joined with the separator.
        separator: of the rows, for `text`.
        dataset, split, column, config, revision, files, local, data_dir, max_bytes: as in `DataSet`.
        nsamples, seqlen, seed, save, bos: as in `TextWindows`.
    """
    data = DataSet(dataset, split, column, config, revision, files, local, data_dir, max_bytes=max_bytes)
    if windows == "document":
        return DocumentWindows(data, nsamples, seqlen, seed, save, bos)
    return TextWindows(Corpus(data, separator), nsamples, seqlen, seed, save, bos)


def save_samples(samples: CalibrationSet, path: Path) -> None:
    """Write the token ids [samples, tokens] under `tokens`, with source, seed and digest beside them.

    Raises:
        UserError: there is another file of that name.
    """
    if path.exists():
        with suppress(UserError):  # no token ids at all
            if torch.equal(read_token_file(str(path)), samples.tokens_NL):
                return
        raise UserError(f"must not be a file with other samples in it, but there is {path}; choose another", "save")
    about = {"source": samples.source, "seed": str(samples.seed), "digest": samples.digest}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unfinished:
            save_file({"tokens": samples.tokens_NL.contiguous()}, unfinished, metadata=about)
    except (OSError, SafetensorError) as error:
        raise UserError(f"must be a file that can be written; {error}", field="save") from error


def _check(samples: TextWindows | DocumentWindows | TokenSamples) -> None:
    require_counts(samples, "nsamples")
    require_counts(samples, "seqlen", least=2)
    if samples.save is not None and not samples.save.endswith(".safetensors"):
        raise UserError(f"must be a file name that ends in .safetensors, not {samples.save!r}", field="save")


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))
