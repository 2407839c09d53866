"""A text is its rows or its files, joined and tokenised as one, with nothing lost and nothing added."""

import gzip
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from barber.data.datasets import DataSet
from barber.data.texts import Corpus, TextFiles, TokenFile, tokenise
from tests import tiny
from tests.data.files import complaint, write, write_column

#: Line ends and marks that a reader could take for line ends, or leave out.
STRAY = "one\r\ntwo\rthree\u2028four\x85five\x0b\n\n \n\u2029six\t\n"


def read(path: Path | str, column: str = "text") -> str:
    """The text that the tokens of files stand for."""
    tokenizer = tiny.tokenizer()
    text = tokenizer.decode(TextFiles(str(path), column).tokens(tokenizer).tokens_T)
    assert isinstance(text, str)
    return text


def corpus(folder: Path, *texts: str, separator: str = "\n\n", first: int | None = None) -> Corpus:
    write_column(folder / "rows.jsonl", texts)
    data = DataSet("org/name", "test", local=("rows.jsonl",), data_dir=str(folder), first=first)
    return Corpus(data, separator)


# A data set as one text


@pytest.mark.parametrize("separator", ["\n\n", " ", "", "<sep>"])
def test_the_rows_of_a_corpus_are_joined_with_the_separator(
    tmp_path: Path, separator: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokens = corpus(tmp_path, "", " = Heading = \n", "", "thírd", separator=separator).tokens(tokenizer)
    assert tokenizer.decode(tokens.tokens_T) == separator.join(["", " = Heading = \n", "", "thírd"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.text(max_size=4))
def test_the_tokens_are_those_of_the_whole_text(texts: list[str], separator: str) -> None:
    tokenizer = tiny.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokens_T = corpus(Path(folder), *texts, separator=separator).tokens(tokenizer).tokens_T
    assert tokens_T.dtype == torch.int64
    assert tokens_T.tolist() == tokenizer(separator.join(texts))["input_ids"]


def test_the_tokenizer_adds_its_marks_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    marks = TemplateProcessing(single="a $A z", special_tokens=[(mark, tokenizer.vocab[mark]) for mark in "az"])
    tokenizer.backend_tokenizer.post_processor = marks
    tokens_T = corpus(tmp_path, "one", "two", separator=" ").tokens(tokenizer).tokens_T
    assert tokenizer.decode(tokens_T) == "aone twoz"


def test_a_corpus_says_where_its_rows_were_found(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = corpus(tmp_path, "a", "b", "c", separator=" ", first=2).tokens(tokenizer)
    assert tokens.source == f"{tmp_path / 'rows.jsonl'}, test split, column text, first 2 rows"
    assert tokenizer.decode(tokens.tokens_T) == "a b"


def test_a_mistake_in_the_data_of_a_corpus_is_told_by_its_key(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_column(tmp_path / "rows.jsonl", ["a"], "sentence")
    text = Corpus(DataSet("org/name", "test", local=("rows.jsonl",), data_dir=str(tmp_path)), " ")
    assert complaint(lambda: text.tokens(tokenizer)).startswith("column must be a column of ")
    text = Corpus(DataSet("org/name", "test", local=("rows.txt",), data_dir=str(tmp_path)), " ")
    assert complaint(lambda: text.tokens(tokenizer)).startswith(f"{tmp_path} has no rows.txt; download ")


def test_a_model_without_a_tokenizer_can_read_no_corpus(tmp_path: Path) -> None:
    sentence = complaint(lambda: corpus(tmp_path, "a").tokens(None))
    assert sentence.startswith("the model has no tokenizer, so text is of no use; give token ids instead")


# Files


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.raw", "a.txt.gz", "a.md.gz", "a.raw.gz", "a.py", "README"])
def test_a_text_file_is_one_text_to_the_last_byte(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, STRAY)) == STRAY


@pytest.mark.parametrize("column", ["text", "sentence"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet"])
def test_the_rows_of_a_column_are_joined_by_a_blank_line(tmp_path: Path, name: str, column: str) -> None:
    path = write_column(tmp_path / name, ["first", STRAY, "", "thírd"], column)
    assert read(path, column) == f"first\n\n{STRAY}\n\n\n\nthírd"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "e.txt", "fifth")
    write(tmp_path / "a.md", "first")
    write(tmp_path / "b/b.txt.gz", "second")
    write(tmp_path / "b/c.raw", "third\n")
    write_column(tmp_path / "d.jsonl", ["fourth,", "two rows"])
    write_column(tmp_path / "f.parquet", ["sixth"])
    write_column(tmp_path / "g.jsonl.gz", ["seventh"])
    for other in ("a.py", "b/settings.yaml", "picture.png", "README", "z.gz"):
        write(tmp_path / other, b"\xff no text")
    assert read(tmp_path) == "first\n\nsecond\n\nthird\n\n\nfourth,\n\ntwo rows\n\nfifth\n\nsixth\n\nseventh"


def test_a_folder_may_be_named_as_a_file_is(tmp_path: Path) -> None:
    write(tmp_path / "book.txt/chapter.txt", "inside")
    assert read(tmp_path / "book.txt") == "inside"
    assert read(tmp_path) == "inside"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("*.txt", "first\n\nthird"),
        ("**/*.txt", "first\n\nsecond\n\nthird"),
        ("[ab].txt", "first"),
        ("*.jsonl", "rows"),
        ("b/*", "second"),
        ("b/../c.txt", "third"),
    ],
)
def test_a_pattern_chooses_files(tmp_path: Path, pattern: str, text: str) -> None:
    for name, content in {"a.txt": "first", "b/x.txt": "second", "c.txt": "third"}.items():
        write(tmp_path / name, content)
    write_column(tmp_path / "d.jsonl", ["rows"])
    assert read(tmp_path / pattern) == text


@pytest.mark.parametrize("pattern", ["*", "**", "**/*"])
def test_a_pattern_that_matches_folders_too_reads_the_files(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "b/x.txt", "second")
    assert read(tmp_path / pattern) == ("first" if pattern == "*" else "first\n\nsecond")


@pytest.mark.parametrize("name", ["book [1984].txt", "why?.txt", "all*.txt"])
def test_a_file_is_found_though_its_name_looks_like_a_pattern(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, "text")) == "text"


def test_text_files_say_where_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "a.txt", "text")
    assert TextFiles(str(path)).tokens(tokenizer).source == f"text files {path}"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.raw", "a.txt.gz"])
@pytest.mark.parametrize("content", ["", "\n", " \n\t\n"], ids=repr)
def test_files_without_a_word_are_refused_unless_there_are_others(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    for where in (path, tmp_path):
        assert complaint(lambda where=where: read(where)) == (
            f"path must be text files with text in them; {where} is empty"
        )
    write(tmp_path / "b.txt", "text")
    assert read(tmp_path).strip() == "text"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.parquet"])
def test_files_without_rows_or_with_blank_ones_are_refused(tmp_path: Path, name: str) -> None:
    for rows in ([], ["", " \n"]):
        assert f"{tmp_path / name} is empty" in complaint(lambda rows=rows: read(write_column(tmp_path / name, rows)))


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere/*.txt", "none"])
def test_no_files_at_all_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "none").mkdir()
    assert complaint(lambda: read(tmp_path / path)) == (
        f"path must be text files or a folder of them; {tmp_path / path} has none"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "naïve".encode("latin-1")),
        ("latin.raw", "naïve".encode("latin-1")),
        ("latin.jsonl", '{"text": "naïve"}'.encode("latin-1")),
        ("plain.txt.gz", b"no gzip"),
        ("plain.jsonl.gz", b"no gzip"),
        ("cut.md.gz", gzip.compress(bytes(range(256)))[:50]),
        ("cut.jsonl.gz", gzip.compress(bytes(range(256)))[:50]),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b'),
        ("none.parquet", b"no parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_named_among_all_of_the_folder(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "z.txt", "text")
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in complaint(lambda: read(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_wrong_column_is_told_by_the_setting_that_is_wrong(tmp_path: Path, name: str) -> None:
    path = write_column(tmp_path / name, ["a"])
    assert complaint(lambda: read(path, "sentence")) == (
        f"column must be a column of {path}, not 'sentence'; it has id, text"
    )


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", r'{"text": "half \ud83d of a smile"}')
    assert complaint(lambda: read(path))


# Token ids


def test_token_files_are_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    save_file({"tokens": torch.arange(6, dtype=torch.int32).view(2, 3)}, path)
    tokens = TokenFile(str(path)).tokens(None)
    assert tokens.tokens_T.tolist() == list(range(6))
    assert tokens.tokens_T.dtype == torch.int64
    assert tokens.source == f"token ids of {path}"


def test_a_long_text_is_tokenised_whole_and_without_a_warning(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.model_max_length = 16
    assert len(tokenise("a" * 1000, tokenizer)) == 1000
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
