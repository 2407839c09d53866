"""Rows of text come whole from every kind of file and from the hub; what is broken is told in one sentence."""

import gzip
import inspect
import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given, settings
from hypothesis import strategies as st

from barber.data.datasets import DataSet, Rows, find, kind_of, open_text, read_column, read_rows
from barber.runtime import hub
from tests.data.files import complaint, write, write_column

JSON_KINDS = [".jsonl", ".json", ".jsonl.gz", ".json.gz"]
ROW_KINDS = [*JSON_KINDS, ".parquet"]
LINE_KINDS = [".txt", ".txt.gz", ".raw", ".raw.gz"]

#: Texts as crawled pages have them: no line of the file ends where one of these marks stands.
STRAY = ["one\u2028two", "one\u2029two", "one\x85two", "one\rtwo", "one\x0b\x0c\x1ctwo", "zero\ufeffwidth", "plain"]


def data_set(**settings: Any) -> DataSet:
    return DataSet(**{"dataset": "org/name", "split": "test", "local": ("set/test.jsonl", "set/*test*")} | settings)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unreachable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory on a machine without a network, which nobody has told so."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    return folder


def hub_gives(answer: datasets.Dataset | Exception, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let the hub answer, and note what it is asked for."""
    signature, asked = inspect.signature(datasets.load_dataset), []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append(dict(signature.bind(*args, **kwargs).arguments))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    return asked


def table(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


# Files


@pytest.mark.parametrize("column", ["text", "sentence"])
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_rows_and_columns_come_as_they_were_written(tmp_path: Path, kind: str, column: str) -> None:
    texts = ["first", "", " spaced\t", "of\ntwo lines\n", *STRAY, "ἀναρχία 🙂"]
    path = write_column(tmp_path / f"rows{kind}", texts, column)
    assert list(read_column(path, column)) == texts
    assert list(read_rows(path)) == [{"id": number, column: text} for number, text in enumerate(texts)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=6), st.sampled_from(ROW_KINDS))
def test_any_text_comes_as_it_was_written(texts: list[str], kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert list(read_column(write_column(Path(folder) / f"rows{kind}", texts), "text")) == texts


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_blank_lines_between_json_rows_are_no_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows{kind}", '\n{"text": "a"}\n  \n\r\n{"text": "b"}\r\n\n')
    assert list(read_column(path, "text")) == ["a", "b"]


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("kind", [".txt", ".txt.gz"])
def test_a_line_of_a_txt_file_is_a_stripped_row(tmp_path: Path, kind: str, ending: str) -> None:
    lines = [" no it was n't black monday ", "", *STRAY, "windows\r", " last"]
    path = write(tmp_path / f"lines{kind}", "\n".join(lines) + ending)
    assert list(read_column(path, "text")) == ["no it was n't black monday", "", *STRAY, "windows", "last"]


@pytest.mark.parametrize("kind", [".raw", ".raw.gz"])
def test_a_line_of_a_raw_file_is_a_row_as_the_hub_has_them(tmp_path: Path, kind: str) -> None:
    lines = [" \n", " = Robert Boulter = \n", " \n", "\n", *(line + "\n" for line in STRAY), " last"]
    rows = ["", " = Robert Boulter = \n", "", "", *(line + "\n" for line in STRAY), " last"]
    assert list(read_column(write(tmp_path / f"wiki{kind}", "".join(lines)), "text")) == rows


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), min_size=1, max_size=6))
def test_lines_end_at_newlines_and_nowhere_else(lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind in LINE_KINDS:
            path = write(Path(folder) / f"lines{kind}", "".join(line + "\n" for line in lines))
            kept = [line + "\n" if line.strip() else "" for line in lines]
            expected = kept if kind.startswith(".raw") else [line.strip() for line in lines]
            assert list(read_column(path, "text")) == expected


@pytest.mark.parametrize("kind", LINE_KINDS)
def test_lines_are_the_column_that_is_asked_for_whatever_its_name(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"lines{kind}", "first\nsecond")
    assert [row.strip() for row in read_column(path, "sentence")] == ["first", "second"]
    assert list(read_rows(path, "sentence")) == [{"sentence": row} for row in read_column(path, "sentence")]
    assert [list(row) for row in read_rows(path)] == [["text"], ["text"]]


def test_the_first_rows_need_no_more_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "set/test.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c was cut o')
    assert data_set(data_dir=str(tmp_path), first=2).rows().texts == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ".txt"),
        ("a.txt.gz", ".txt"),
        ("c4-train.00000-of-01024.json.gz", ".json"),
        ("wiki.test.raw", ".raw"),
        ("folder.gz/a.parquet", ".parquet"),
        ("a.gz", ""),
        ("README", ""),
    ],
)
def test_gz_does_not_hide_what_kind_a_file_is_of(name: str, kind: str) -> None:
    assert kind_of(Path(name)) == kind


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_an_opened_text_is_read_unchanged(tmp_path: Path, name: str) -> None:
    text = "thírd\r\n" + "\n".join(STRAY) + "\r"
    with open_text(write(tmp_path / name, text)) as file:
        assert file.read() == text


# Files that are not what they should be


def test_a_cut_off_jsonl_or_a_file_that_is_one_array_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "array.json", json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert complaint(lambda: list(read_rows(path))).startswith(f"line 1 of {path} is no JSON (")
    for kind in JSON_KINDS:
        path = write(tmp_path / f"rows{kind}", '{"text": "a"}\n\n{"text": "b"}\n{"text": "c was cut o')
        sentence = complaint(lambda path=path: list(read_rows(path)))
        assert sentence.startswith(f"line 4 of {path} is no JSON (")
        assert sentence.endswith("was the file cut off?")


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "3", "null", "[" + "1, " * 1000 + "1]"])
def test_json_that_is_no_object_names_its_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "rows.jsonl", f'{{"text": "a"}}\n{line}\n')
    sentence = complaint(lambda: list(read_rows(path)))
    assert sentence == f"line 2 of {path} must be a JSON object, not {line[:40]}"


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_wrong_column_names_the_columns_there_are(tmp_path: Path, kind: str) -> None:
    path = write_column(tmp_path / f"rows{kind}", ["a", "b"], "sentence")
    sentence = complaint(lambda: list(read_column(path, "text")))
    assert sentence == f"column must be a column of {path}, not 'text'; it has id, sentence"
    later = write(tmp_path / "later.jsonl", '{"text": "a"}\n{"txt": "b"}\n')
    sentence = complaint(lambda: list(read_column(later, "text")))
    assert sentence == f"column must be a column of {later}, not 'text'; it has txt"


@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("texts", [[None], [7], [["a\nb"]], ["a", "b", "c", None]], ids=repr)
def test_a_value_that_is_no_text_is_shown(tmp_path: Path, kind: str, texts: list[object]) -> None:
    path = write_column(tmp_path / f"rows{kind}", texts)
    sentence = complaint(lambda: list(read_column(path, "text")))
    assert sentence == f"column must hold text in every row; row {len(texts)} of {path} has {texts[-1]!r}"


@pytest.mark.parametrize("kind", [*JSON_KINDS, *LINE_KINDS, ".parquet"])
def test_a_file_without_rows_is_told_to_be_empty(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows{kind}"
    write_column(path, []) if kind == ".parquet" else write(path, "")
    assert complaint(lambda: list(read_rows(path))) == f"{path} is empty; download it again"
    if kind.endswith(".gz"):
        path.write_bytes(b"")
        assert complaint(lambda: list(read_rows(path))) == f"{path} is empty; download it again"


@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".raw"])
@pytest.mark.parametrize("harm", ["no gzip", "cut off", "cut off in its header", "wrong checksum"])
def test_a_gzip_file_that_is_not_whole_is_refused(tmp_path: Path, kind: str, harm: str) -> None:
    path = tmp_path / f"rows{kind}.gz"
    whole = gzip.compress(b"".join(json.dumps({"text": str(i) * 9}).encode() + b"\n" for i in range(200)))
    content = {
        "no gzip": b'{"text": "a"}\n',
        "cut off": whole[: len(whole) // 2],
        "cut off in its header": whole[:5],
        "wrong checksum": whole[:-8] + b"\x00" * 8,
    }[harm]
    path.write_bytes(content)
    sentence = complaint(lambda: list(read_rows(path)))
    assert sentence.startswith(f"{path} is no whole gzip file (")
    assert sentence.endswith("); download it again")


@pytest.mark.parametrize("place", range(10, 400, 30))
def test_a_gzip_file_that_is_damaged_inside_is_refused(tmp_path: Path, place: int) -> None:
    whole = gzip.compress(b"".join(json.dumps({"text": str(i) * 9}).encode() + b"\n" for i in range(200)))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[:place] + b"\xff" * 20 + whole[place + 20 :])
    assert str(path) in complaint(lambda: list(read_rows(path)))


@pytest.mark.parametrize("harm", ["no parquet", "without a byte", "cut off", "damaged footer"])
def test_a_parquet_file_that_is_not_whole_is_refused(tmp_path: Path, harm: str) -> None:
    path = write_column(tmp_path / "rows.parquet", [str(i) * 50 for i in range(100)])
    whole = path.read_bytes()
    content = {
        "no parquet": b'{"text": "a"}\n',
        "without a byte": b"",
        "cut off": whole[: len(whole) // 2],
        "damaged footer": whole[:-200] + b"\xff" * 100 + whole[-100:],
    }[harm]
    path.write_bytes(content)
    assert complaint(lambda: list(read_rows(path))).startswith(f"{path} is no whole parquet file (")
    path.write_bytes(whole[:4] + b"\xff" * 100 + whole[104:])  # damaged pages
    assert str(path) in complaint(lambda: list(read_rows(path)))


@pytest.mark.parametrize("kind", [".jsonl", ".json.gz", ".txt", ".raw"])
def test_a_file_that_is_no_utf_8_is_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows{kind}", '{"text": "naïve"}\n'.encode("latin-1"))
    assert complaint(lambda: list(read_rows(path))).startswith(f"{path} is no UTF-8 text (")


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.gz", "rows", "rows.jsonl.zst"])
def test_a_file_of_an_unknown_kind_is_told_the_known_ones(tmp_path: Path, name: str) -> None:
    sentence = complaint(lambda: list(read_rows(write(tmp_path / name, "text"))))
    assert sentence.startswith(f"{tmp_path / name} is of no kind that can be read")
    assert all(kind in sentence for kind in (".jsonl", ".json", ".txt", ".raw", ".parquet", ".gz"))


@pytest.mark.parametrize("kind", [".jsonl", ".json.gz", ".txt", ".raw", ".parquet"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows{kind}"
    assert complaint(lambda: list(read_rows(path))).startswith(f"{path} cannot be read: ")


# A folder


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    for name in ("set/b-test.txt", "set/a-test.txt", "set/train.txt", "other/test.txt"):
        write(tmp_path / name, "text")
    assert find(tmp_path, ["other/test.txt", "set/*"]) == tmp_path / "other/test.txt"
    assert find(tmp_path, ["set/test.txt", "set/*test*", "other/*"]) == tmp_path / "set/a-test.txt"
    assert find(tmp_path, ["set/valid*", "*.txt"]) is None
    assert find(tmp_path, []) is None
    assert find(tmp_path / "nowhere", ["*"]) is None


def test_a_folder_is_no_file_even_where_a_pattern_matches_it(tmp_path: Path) -> None:
    write(tmp_path / "set/test/0000.txt", "text")
    write(tmp_path / "set/wiki.test.txt", "text")
    assert find(tmp_path, ["set/*test*"]) == tmp_path / "set/wiki.test.txt"
    assert find(tmp_path, ["set/test"]) is None


def test_marks_of_a_pattern_in_the_name_of_the_folder_are_only_a_name(tmp_path: Path) -> None:
    write(tmp_path / "data [v1]*/a.txt", "text")
    assert find(tmp_path / "data [v1]*", ["*.txt"]) == tmp_path / "data [v1]*/a.txt"


@pytest.mark.parametrize(
    "name", ["set/test.jsonl", "set/rows-test.parquet", "set/ptb.test.txt", "set/x.test.json.gz", "set/wiki.test.raw"]
)
def test_a_named_folder_is_read_and_the_hub_is_not_asked(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub_gives(table(text=["of the hub"]), monkeypatch)
    path = folder / name
    path.parent.mkdir()
    texts = ["first\n", "second\n", "third\n"]
    write(path, "".join(texts)) if path.suffix in (".txt", ".raw") else write_column(path, texts)
    rows = data_set(data_dir=str(folder)).rows()
    assert [text.strip() for text in rows.texts] == ["first", "second", "third"]
    assert rows.source == f"{path}, test split, column text"
    first = data_set(data_dir=str(folder), first=2).rows()
    assert first.texts == rows.texts[:2]
    assert first.source == f"{path}, test split, column text, first 2 rows"
    assert data_set(data_dir=str(folder), first=10).rows().texts == rows.texts
    assert not asked


def test_a_folder_that_is_not_there_or_without_the_file_is_told_what_belongs_there(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    begins = {tmp_path: f"{tmp_path} has no set/test.jsonl or set/*test*; ", nowhere: f"there is no folder {nowhere}; "}
    for folder, beginning in begins.items():
        sentence = complaint(data_set(data_dir=str(folder)).rows)
        assert sentence.startswith(f"{beginning}download the test split of org/name ")
        assert sentence.endswith("put it into FOLDER/set/test.jsonl and say data_dir=FOLDER")


def test_without_a_place_to_look_at_the_setting_local_is_named(folder: Path) -> None:
    write(folder / "NAME.jsonl", '{"text": "a"}')
    sentence = complaint(data_set(data_dir=".", local=()).rows)
    assert "org/name" in sentence
    assert "local" in sentence


# The hub


def test_without_a_network_the_folder_data_is_read(unreachable: Path) -> None:
    write(unreachable / "data/set/test.jsonl", '{"text": "a"}\n{"text": "b"}')
    assert data_set(first=1).rows() == Rows(["a"], "data/set/test.jsonl, test split, column text, first 1 rows")


def test_without_a_network_nor_a_folder_both_are_told(unreachable: Path) -> None:
    sentence = complaint(data_set().rows)
    assert sentence.startswith("the Hugging Face hub cannot be reached and there is no folder data; download the test ")
    (unreachable / "data").mkdir()
    sentence = complaint(data_set().rows)
    assert sentence.startswith("the Hugging Face hub cannot be reached and data has no set/test.jsonl or set/*test*; ")


@pytest.mark.parametrize(
    "settings",
    [{}, {"config": "a"}, {"revision": "refs/convert/parquet"}, {"files": "en/a.json.gz", "revision": "main"}],
    ids=str,
)
def test_without_a_network_nobody_waits_for_it(
    unreachable: Path, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []

    def fail(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)
    assert "cannot be reached" in complaint(data_set(**settings).rows)
    assert not tried
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_the_hub_gives_the_rows_of_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_gives(table(id=[0, 1, 2], sentence=["a", "", "c\n"]), monkeypatch)
    rows = data_set(column="sentence").rows()
    assert list(rows.texts) == ["a", "", "c\n"]
    assert rows.source == "org/name of the Hugging Face hub, test split, column sentence"
    first = data_set(column="sentence", first=2).rows()
    assert list(first.texts) == ["a", ""]
    assert first.source == "org/name of the Hugging Face hub, test split, column sentence, first 2 rows"


def test_the_hub_is_asked_for_what_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub_gives(table(text=["a"]), monkeypatch)
    data_set(config="raw-v1", split="train", revision="1a2b").rows()
    data_set(files="en/c4-validation.00000-of-00008.json.gz", split="validation").rows()
    chosen = [{key: value for key, value in call.items() if value is not None} for call in asked]
    assert chosen == [
        {"path": "org/name", "name": "raw-v1", "split": "train", "revision": "1a2b"},
        {
            "path": "org/name",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
            "verification_mode": datasets.VerificationMode.NO_CHECKS,
        },
    ]


def test_a_wrong_column_of_the_hub_names_the_columns_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_gives(table(id=[0], sentence=["a"]), monkeypatch)
    sentence = complaint(data_set().rows)
    assert sentence == "column must be a column of org/name, not 'text'; it has id, sentence"


@pytest.mark.parametrize("values", [[0, 1], ["a", None], [["a"], ["b"]]], ids=str)
def test_a_column_of_the_hub_that_holds_no_text_is_refused(values: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub_gives(table(text=values), monkeypatch)
    sentence = complaint(data_set().rows)
    assert sentence.startswith("column must hold text")
    assert "org/name" in sentence


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach\nit"), ConnectionResetError("reset")], ids=repr)
def test_a_hub_that_cannot_be_reached_is_stood_in_for_by_the_folder(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub_gives(error, monkeypatch)
    assert "the Hugging Face hub cannot be reached and there is no folder data" in complaint(data_set().rows)
    write(folder / "data/set/test.jsonl", '{"text": "a"}')
    assert data_set().rows() == Rows(["a"], "data/set/test.jsonl, test split, column text")
    assert len(asked) == 2


def no_such_page() -> Exception:
    try:
        from httpx2 import Request, Response  # as huggingface_hub has it, by its version
    except ImportError:
        from httpx import Request, Response
    return HfHubHTTPError(
        "404 Client Error.\n\nNot Found", response=Response(404, request=Request("GET", "http://hub"))
    )


def broken_off() -> Exception:
    library_error = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return library_error("peer closed connection\nwithout sending the body")


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub\nor cannot be accessed."),
        DataFilesNotFoundError("No (supported) data files found"),
        DatasetGenerationError("An error occurred while generating the dataset"),
        ValueError("BuilderConfig 'x' not found.\nAvailable: ['a', 'b']"),
        FileNotFoundError("Couldn't find any data file"),
        RuntimeError("Dataset scripts are no longer supported, but found name.py"),
        no_such_page(),
        broken_off(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_refuses_is_told_and_not_stood_in_for(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "data/set/test.jsonl", '{"text": "a"}')
    hub_gives(error, monkeypatch)
    sentence = complaint(data_set().rows)
    assert sentence == f"dataset is org/name, which cannot be read from the hub: {' '.join(str(error).split())}"
