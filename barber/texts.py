"""Where text comes from, for calibration and for evaluation: as documents, or as token ids."""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from barber import wikipedia
from barber.errors import UserError
from barber.tensors import Tensor


class Text(Protocol):
    """A text that can be tokenised; str(text) says where it comes from."""

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        """The token ids of the whole text, (T,) int64."""
        ...


@dataclass(frozen=True)
class OfflineText:
    """English Wikipedia articles that need no download: they come with gensim's test data.

    Args:
        part: the articles for calibration, or those for evaluation; the two share no passage.
    """

    part: Literal["calibration", "evaluation"]

    def __str__(self) -> str:
        return f"Wikipedia articles in gensim's test data, {self.part} part"

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        return tokenise("\n\n".join(wikipedia.part(self.part)), tokenizer)


@dataclass(frozen=True)
class TextFiles:
    """Plain text files in UTF-8, joined with a blank line in between.

    Args:
        path: a file, a folder (its *.txt, *.md and *.raw files, also in subfolders) or a glob pattern.
    """

    path: str

    def __str__(self) -> str:
        return f"text files {self.path}"

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        root = Path(self.path)
        if root.is_dir():
            files = sorted(path for path in root.rglob("*") if path.suffix in (".txt", ".md", ".raw"))
        else:
            files = sorted(Path(path) for path in glob.glob(self.path, recursive=True))
        if not files:
            raise UserError(f"must be text files or a folder of them; {self.path} has none", field="path")
        try:
            return tokenise("\n\n".join(path.read_text(encoding="utf-8") for path in files), tokenizer)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"must be UTF-8 text files; reading {self.path} failed: {error}", field="path") from error


@dataclass(frozen=True)
class TokenFile:
    """Token ids in a safetensors file, int32 or int64, under the key `tokens`; more than one axis is read row by row.

    Args:
        path: the file.
    """

    path: str

    def __str__(self) -> str:
        return f"token ids of {self.path}"

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        return read_token_file(self.path).flatten()


def read_token_file(path: str) -> Tensor:
    """The tensor `tokens` of a safetensors file as int64.

    Raises:
        UserError: no such file, no safetensors file, no such key, or no integers.
    """
    if not Path(path).is_file():
        raise UserError(f"must be a safetensors file of token ids; {path} is not there", field="path")
    try:
        with safe_open(path, framework="pt") as file:
            keys = sorted(file.keys())
            if "tokens" not in keys:
                raise UserError(f"must hold the key 'tokens'; {path} has {', '.join(keys) or 'no key'}", field="path")
            tokens: Tensor = file.get_tensor("tokens")
    except SafetensorError as error:
        raise UserError(f"must be a safetensors file of token ids; {path} is none ({error})", field="path") from error
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise UserError(f"must hold integers under 'tokens'; {path} has {tokens.dtype}", field="path")
    return tokens.long()


def tokenise(text: str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The token ids of a text, (T,) int64; special tokens as the tokenizer adds them to one text.

    Raises:
        UserError: the model has no tokenizer.
    """
    if tokenizer is None:
        raise UserError(
            "the model has no tokenizer, so text is of no use; give token ids instead (calibration=tokens, "
            "evals/text=tokens)"
        )
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    assert isinstance(ids, Tensor)
    return ids.long()
