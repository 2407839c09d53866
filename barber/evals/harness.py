"""lm-eval's hold on a model in memory: it leaves the model as it is, and what it says nothing about is seen."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.errors import NumericsError
from barber.runtime.tensors import Tensor


@dataclass
class Prompts:
    """What went through the model.

    Args:
        asked: how many prompts, of answers one each.
        cut: how many of them were longer than the model and lost their beginning.
        longest: how many tokens the model takes.
    """

    asked: int = 0
    cut: int = 0
    longest: int = 0

    def note(self, lengths: Sequence[int], most: int) -> None:
        """Take in the tokens of prompts of which `most` are kept."""
        self.asked += len(lengths)
        self.cut += sum(length > most for length in lengths)


@contextmanager
def harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[tuple[Any, Prompts]]:
    """lm-eval's HFLM around a model, and what it has asked, inside this context.

    HFLM (0.4.13) ties the head to the embedding where the config says so, though the model's own head may be another;
    takes logits of NaN for answers, of which the first choice wins; and cuts what is too long with a warning that
    nobody sees in a record.

    Raises:
        NumericsError: logits are NaN or infinite.
    """
    from lm_eval.models.huggingface import HFLM

    # lm-eval does not do without such a token, though only a question without a context would begin with it
    prefix = 0 if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None else None
    with _not_tied_again(model):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, prefix_token_id=prefix)
    prompts = Prompts(longest=lm.max_length)
    score, encode = lm._loglikelihood_tokens, lm.tok_batch_encode

    def scored(requests: list[tuple[Any, list[int], list[int]]], *args: Any, **options: Any) -> Any:
        prompts.note([len(context) + len(answer) for _, context, answer in requests], lm.max_length + 1)
        return score(requests, *args, **options)

    def encoded(strings: list[str], *args: Any, left_truncate_len: int | None = None, **options: Any) -> Any:
        if left_truncate_len is not None:  # of a text that the model is to go on with
            prompts.note([len(lm.tok_encode(string)) for string in strings], left_truncate_len)
        return encode(strings, *args, left_truncate_len=left_truncate_len, **options)

    lm._loglikelihood_tokens, lm.tok_batch_encode = scored, encoded
    handle = model.register_forward_hook(lambda _, args, output: _require_finite(output.logits))
    try:
        yield lm, prompts
    finally:
        handle.remove()


@contextmanager
def _not_tied_again(model: PreTrainedModel) -> Iterator[None]:
    model.tie_weights = lambda *args, **options: None
    try:
        yield
    finally:
        del model.tie_weights


def _require_finite(logits_BLV: Tensor) -> None:
    """A word that is ruled out may have minus infinity; NaN and infinity are the highest of their row."""
    if not torch.isfinite(logits_BLV.amax(dim=-1)).all():
        raise NumericsError("the evaluated model's logits are NaN or infinite")
