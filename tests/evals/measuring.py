"""What measurements of tiny models need."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from barber.data.texts import Tokens
from barber.runtime.cache import Cache
from tests import tiny


@dataclass(frozen=True)
class Ids:
    """A text that is tokenised already: random ids of the tiny models."""

    count: int
    seed: int = 5
    source: str | None = None

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tokens:
        return Tokens(tiny.tokens(1, self.count, self.seed)[0], self.source or f"{self.count} ids")


def quiet(what: str, steps: int) -> Callable[[int], None]:
    """Watches nothing."""
    return lambda done: None
