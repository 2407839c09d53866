"""Texts, for calibration and for evaluation: where they come from, and their token ids."""

import glob
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from barber.data import wikipedia
from barber.data.datasets import MAX_BYTES, Budget, DataSet, kind_of, open_text, read_column
from barber.errors import UserError, require_counts
from barber.runtime.cache import Cache, Entry
from barber.runtime.files import written_whole
from barber.runtime.tensors import Tensor

log = logging.getLogger("barber")


@dataclass(frozen=True)
class Tokens:
    """The token ids of a text, (T,) int64, and where the text was found."""

    tokens_T: Tensor
    source: str


class Text(Protocol):
    """A text that can be tokenised."""

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tokens:
        """The token ids of the whole text; `cache` keeps them for later runs."""
        ...


@dataclass(frozen=True)
class Corpus:
    """The rows of a data set as one text.

    Args:
        data: the data set.
        separator: what stands between two rows.
        max_windows: the protocol of this text measures no more windows of it than so many; None: all.
    """

    data: DataSet
    separator: str
    max_windows: int | None = None

    def __post_init__(self) -> None:
        require_counts(self, "max_windows")

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tokens:
        rows = self.data.rows()
        return Tokens(tokenise(self.separator.join(rows.texts), tokenizer, cache), rows.source)


@dataclass(frozen=True)
class OfflineText:
    """English Wikipedia articles that need no download: they come with gensim's test data.

    Args:
        part: the articles for calibration, or those for evaluation; the two share no passage.
    """

    part: Literal["calibration", "evaluation"]

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tokens:
        tokens_T = tokenise("\n\n".join(wikipedia.part(self.part)), tokenizer, cache)
        return Tokens(tokens_T, f"Wikipedia articles in gensim's test data, {self.part} part")


def corpus(
    dataset: str,
    split: str = "test",
    column: str = "text",
    config: str | None = None,
    revision: str | None = None,
    files: str | None = None,
    local: Sequence[str] = (),
    data_dir: str | None = None,
    first: int | None = None,
    separator: str = "\n\n",
    max_windows: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Corpus:
    """A corpus from one flat set of options, those of `DataSet` and of `Corpus`."""
    data = DataSet(dataset, split, column, config, revision, files, local, data_dir, first, max_bytes)
    return Corpus(data, separator, max_windows)


@dataclass(frozen=True)
class TextFiles:
    """Text files in UTF-8, joined with a blank line in between; of .jsonl and .parquet files, a column's rows likewise.

    Args:
        path: a file, a folder (its .txt, .md, .raw, .jsonl and .parquet files, also in subfolders and with .gz) or a
            glob pattern.
        column: the column of .jsonl and .parquet files that holds the text.
        max_bytes: refuse more text than that, unpacked, in all files together.
    """

    path: str
    column: str = "text"
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        require_counts(self, "max_bytes", most=None)

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tokens:
        root = Path(self.path)
        if root.is_dir():
            files = sorted(path for path in root.rglob("*") if path.is_file() and kind_of(path) in _TEXT_KINDS)
        elif root.is_file():  # brackets in its name make no pattern
            files = [root]
        else:
            found = (Path(path) for path in glob.glob(self.path, recursive=True))
            files = sorted(path for path in found if path.is_file())
        if not files:
            raise UserError(f"must be text files or a folder of them; {self.path} has none", field="path")
        budget = Budget(self.max_bytes)
        texts = [text for file in files for text in self._read(file, budget)]
        if not any(text.strip() for text in texts):
            raise UserError(f"must be text files with text in them; {self.path} is empty", field="path")
        return Tokens(tokenise("\n\n".join(texts), tokenizer, cache), f"text files {self.path}")

    def _read(self, file: Path, budget: Budget) -> list[str]:
        if kind_of(file) in _ROW_KINDS:
            return list(read_column(file, self.column, budget))
        try:
            with open_text(file, budget) as stream:
                return [stream.read()]
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"must be UTF-8 text files; reading {file} failed: {error}", field="path") from error


_ROW_KINDS = (".jsonl", ".json", ".parquet")
_TEXT_KINDS = (".txt", ".md", ".raw", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TokenFile:
    """Token ids in a safetensors file, int32 or int64, under the key `tokens`; more than one axis is read row by row.

    Args:
        path: the file.
    """

    path: str

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tokens:
        return Tokens(read_token_file(self.path).flatten(), f"token ids of {self.path}")


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
            digest = (file.metadata() or {}).get("digest")
    except SafetensorError as error:
        raise UserError(f"must be a safetensors file of token ids; {path} is none ({error})", field="path") from error
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise UserError(f"must hold integers under 'tokens'; {path} has {tokens.dtype}", field="path")
    if digest not in (None, digest_of_ids(tokens.long())):
        raise UserError(f"must be a file as calibration.save wrote it; {path} is damaged", field="path")
    return tokens.long()


def digest_of_ids(tokens: Tensor) -> str:
    """SHA-256 of the shape and of int64 token ids."""
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.contiguous().numpy().tobytes()).hexdigest()


def tokenise(text: str, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tensor:
    """The token ids of a text, (T,) int64; special tokens as the tokenizer adds them to one text.

    Args:
        cache: keeps them for later runs, found by the text and the tokenizer.

    Raises:
        UserError: the model has no tokenizer.
    """
    if tokenizer is None:
        raise UserError(
            "the model has no tokenizer, so text is of no use; give token ids instead (calibration=tokens, "
            "evals/text=tokens)"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold it, tokenizers do not take it for text
        raise UserError(f"there is text that is no Unicode ({error})") from error

    def make() -> Tensor:
        # With return_tensors transformers looks at every id in a loop of Python's, which takes as long as the ids do.
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if cache is None or backend is None:
        return make()
    facts = {"text": _sha256(text), "tokenizer": _sha256(backend.to_str()), "tokenizers": tokenizers.__version__}
    return _kept(cache.entry("tokens", facts), make)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """SHA-256 of what a tokenizer makes of texts; None where there is none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    # What tokenising sets for itself is left out.
    content = {key: value for key, value in known.items() if key not in ("truncation", "padding")}
    return _sha256(json.dumps([content, tokenizer.special_tokens_map], sort_keys=True, default=str))


def leading_bos(tokenizer: PreTrainedTokenizerBase | None, wanted: bool) -> Tensor:
    """What a window begins with before its text: the tokenizer's beginning-of-sequence token, (1,) int64, or nothing.

    Raises:
        UserError: it is wanted, and there is none.
    """
    if not wanted:
        return torch.empty(0, dtype=torch.int64)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise UserError("must be false, the model's tokenizer has no beginning-of-sequence token", field="bos")
    return torch.tensor([bos])


def without_leading(tokens_T: Tensor, bos_B: Tensor) -> Tensor:
    """A text without the BOS token that the tokenizer may have put before it, where every window gets its own."""
    return tokens_T[1:] if len(bos_B) and torch.equal(tokens_T[:1], bos_B) else tokens_T


def _kept(entry: Entry, make: Callable[[], Tensor]) -> Tensor:
    file = entry.folder / "tokens.safetensors"

    def read() -> Tensor | None:
        try:
            return load_file(file)["tokens"]
        except (OSError, KeyError, SafetensorError):
            return None

    def make_and_keep() -> Tensor:
        tokens_T = make()
        try:
            with written_whole(file) as unfinished:
                save_file({"tokens": tokens_T}, unfinished)
            entry.complete()
        except (OSError, SafetensorError) as error:
            log.warning("The token ids are not kept for other runs: %s", error)
        return tokens_T

    return entry.read_or_make("the token ids of a text", read, make_and_keep)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
