"""The real data sets, where they are at hand, are read and joined as the papers have them."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from barber.data.datasets import DataSet, read_column
from barber.data.texts import Corpus

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared(name: str) -> Path:
    """A file of the real data, which the repository does not hold."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"needs the real data set {path}")
    return path


@pytest.mark.parametrize(
    ("name", "count", "beginning"),
    [
        (
            "wikitext-2-raw-v1/wiki.test.raw",
            4358,
            ["", " = Robert Boulter = \n", "", " Robert Boulter is an English film"],
        ),
        ("ptb/ptb.test.txt", 3761, ["no it was n't black monday"]),
        ("ptb/ptb.train.txt", 42068, ["aer banknote berlitz calloway", "pierre <unk> N years old will join the board"]),
    ],
)
def test_a_real_data_set_has_the_rows_of_the_hub(name: str, count: int, beginning: list[str]) -> None:
    texts = list(read_column(shared(name), "text"))
    assert len(texts) == count
    assert [text[: len(start)] for text, start in zip(texts, beginning, strict=False)] == beginning
    blank = [text for text in texts if not text.strip()]
    assert set(blank) <= {""}
    assert bool(blank) == name.endswith(".raw")


def test_real_wikitext_is_joined_as_the_papers_join_it() -> None:
    texts = list(read_column(shared("wikitext-2-raw-v1/wiki.test.raw"), "text"))
    assert "\n\n".join(texts).startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")


def test_real_wikitext_begins_as_the_papers_have_it(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = shared("wikitext-2-raw-v1/wiki.test.raw").read_bytes().splitlines(keepends=True)
    data = DataSet("Salesforce/wikitext", "test", local=("wikitext-2-raw-v1/*test*",), data_dir=str(SHARED))
    tokens_T = Corpus(data, "\n\n").tokens(tokenizer).tokens_T
    assert tokenizer.decode(tokens_T[:60]).startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an")
    # every byte of the file, less the blanks and newlines of empty rows, and two newlines between any two rows
    assert len(tokens_T) == sum(len(row) for row in rows if row.strip()) + 2 * 4357
