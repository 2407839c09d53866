"""What the tests of data have in common."""

import pytest
from transformers import PreTrainedTokenizerBase

from tests import tiny


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """One that maps every byte to an id."""
    return tiny.tokenizer()
