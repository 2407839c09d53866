"""What a notebook needs around `prune`: samples to calibrate on, and a figure at the end."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from glob import glob
from importlib.resources import files
from os import PathLike
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.data import calibration
from barber.data.calibration import Calibration, TextWindows, text_windows
from barber.data.texts import Tokens, tokenise
from barber.errors import UserError, did_you_mean
from barber.evals.evaluation import Evaluation, Prepared
from barber.evals.watch import Watch
from barber.evals.windows import WindowProtocol
from barber.runtime.bars import Advance, following
from barber.runtime.cache import Cache
from barber.runtime.tensors import Tensor
from barber.walk.arguments import (
    described,
    require_count,
    require_flag,
    require_model,
    require_tokenizer,
    require_tokens,
)
from barber.walk.checks import check_tokens, check_weights, resolve_device
from barber.walk.pruning import evaluating


def calibrate(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | str | PathLike[str],
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    *,
    bos: bool = False,
) -> Tensor:
    """Calibration samples for `prune`: windows of texts, drawn at random.

    Args:
        tokenizer: the model's.
        texts: a list of texts, which are joined; or what `calibration=` takes on the command line, "offline", "c4",
            "wikitext2" or "ptb"; or the path of text files, a folder of them or a glob pattern.
        nsamples: number of windows.
        seqlen: tokens of a window.
        seed: of the drawing; the same seed gives the same windows.
        bos: begin every window with the tokenizer's beginning-of-sequence token, which Gemma models need.

    Returns:
        Token ids, [nsamples, seqlen], int64.

    Raises:
        UserError: no such name or files, texts that are too short, or another argument that is wrong.
    """
    require_tokenizer(tokenizer)
    require_count(nsamples, "nsamples")
    require_count(seqlen, "seqlen", least=2)
    require_count(seed, "seed", least=0)
    require_flag(bos, "bos")
    return _calibration(texts, nsamples, seqlen, seed, bos).sample(tokenizer).tokens_NL


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    seqlen: int | None = None,
    *,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> float:
    """The perplexity of a model, as the pruning papers report it: every window's next tokens, without overlap.

    Args:
        model: as for `prune`.
        tokens: windows of token ids, [windows, tokens]; or the ids of one text, (T,) or [1, T], with `seqlen`.
        seqlen: tokens of the windows that a text is cut into; what is left at its end is dropped.
        device: where to compute; None: where the model is.
        batch_size: windows that go through the model together; None: as many as have 2048 tokens.
        progress: show a bar, which takes the package rich.

    Returns:
        exp(mean cross-entropy), infinite beyond 1e304.

    Raises:
        UserError: an argument is wrong.
        NumericsError: the loss is NaN or infinite.
    """
    require_model(model)
    check_weights(model)
    if batch_size is not None:
        require_count(batch_size, "batch_size")
    require_flag(progress, "progress")
    place = model.device if device is None else resolve_device(str(device))
    tokens_NL = _windows(tokens, seqlen)
    check_tokens(tokens_NL, model.config, "tokens", None if seqlen is None else "seqlen")
    if tokens_NL.shape[1] < 2:
        raise UserError("tokens must be windows of two tokens at least: every token but the first of them is scored")
    text, protocol = _Ids(tokens_NL.long()), WindowProtocol(tokens_NL.shape[1])
    spec = Evaluation(["dense"], {"tokens": text}, [protocol], batch_size=batch_size)
    prepared = Prepared(spec, None, {"tokens": protocol.cut(text, text.tokens(None), None)}, None)
    with following("Measuring perplexity", progress) as advance, evaluating(model):
        results = prepared.measure("dense", model, place, _watching(advance))
    assert results is not None
    found = results.perplexity["tokens"].perplexity
    return math.inf if found is None else found


@dataclass(frozen=True)
class _Texts:
    """Texts in memory, as one text."""

    texts: tuple[str, ...]

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tokens:
        return Tokens(tokenise("\n\n".join(self.texts), tokenizer, cache), "the texts given")


@dataclass(frozen=True)
class _Ids:
    """Token ids in memory, as one text."""

    tokens_NL: Tensor

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tokens:
        return Tokens(self.tokens_NL.flatten(), "the token ids given")


def _calibration(texts: object, nsamples: int, seqlen: int, seed: int, bos: bool) -> Calibration:
    """Where the samples come from, with what is drawn of them."""
    drawn: dict[str, Any] = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed, "bos": bos}
    if isinstance(texts, str) and (node := _named().get(texts)) is not None:
        target = str(node.pop("_target_")).removeprefix("barber.")
        found: Calibration = getattr(calibration, target)(**node | drawn)
        return found
    if isinstance(texts, str | PathLike):
        path = str(texts)
        if not (Path(path).exists() or glob(path, recursive=True)):
            known = list(_named())
            raise UserError(
                f"texts must be a list of texts, a path or a name, but there is no {shortened(path)}"
                f"{did_you_mean(path, known)}"
            )
        return text_windows(path, **drawn)
    return TextWindows(_Texts(_checked(texts)), **drawn)


def _named() -> dict[str, dict[str, Any]]:
    """The calibration sets of the command line that have to be given nothing else, by name."""
    found = {}
    for file in sorted(files("barber.conf").joinpath("calibration").iterdir(), key=lambda file: file.name):
        node: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "path" not in node and "???" not in node.values():
            found[file.name.removesuffix(".yaml")] = node | ({"data_dir": None} if "data_dir" in node else {})
    return found


def _checked(texts: object) -> tuple[str, ...]:
    """Texts that are texts."""
    what = "texts must be a list of texts, a path, or a name such as 'wikitext2', not"
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping | bytes):
        raise UserError(f"{what} {described(texts)}")
    found = []
    for one in texts:
        if not isinstance(one, str):
            raise UserError(f"{what} {described(texts)} that has {described(one)}")
        found.append(one)
    return tuple(found)


def _windows(tokens: object, seqlen: int | None) -> Tensor:
    """Token ids as windows: [windows, tokens], on the CPU."""
    ids = require_tokens(tokens, "tokens")
    if seqlen is None:
        if ids.ndim == 1:
            raise UserError("has to be given for the ids of one text: perplexity(model, tokens, seqlen=2048)", "seqlen")
        return ids.cpu()
    require_count(seqlen, "seqlen", least=2)
    if ids.ndim == 0 or ids.numel() != ids.shape[-1]:
        raise UserError(f"is for the ids of one text, not for tokens of shape {list(ids.shape)}", field="seqlen")
    if ids.numel() < seqlen:
        raise UserError(f"must be at most {ids.numel()}, the tokens of the text, not {seqlen}", field="seqlen")
    return ids.flatten()[: ids.numel() // seqlen * seqlen].view(-1, seqlen).cpu()


def _watching(advance: Advance) -> Watch:
    """A measurement's steps, which it counts one by one, on a bar."""

    def watch(what: str, steps: int) -> Callable[[int], None]:
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            advance(done, steps)

        return step

    return watch
