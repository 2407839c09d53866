"""The calibration set: drawn reproducibly, from nothing but the text it is said to come from."""

import json
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from barber.data import calibration
from barber.data.calibration import CalibrationSet, DocumentWindows, TextWindows, TokenSamples, save_samples
from barber.data.datasets import DataSet
from barber.data.texts import OfflineText, Tokens
from barber.errors import UserError
from barber.runtime.cache import Cache
from tests import tiny
from tests.damage import flip
from tests.data.files import complaint

LETTERS, CAPITALS, DIGITS = "abcdefgh", "ABCDE", "0123456"


@dataclass(frozen=True)
class Ids:
    """A text that is tokenised already: the ids 0, 1, 2, ..."""

    count: int

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None, cache: Cache | None = None) -> Tokens:
        return Tokens(torch.arange(self.count), f"{self.count} ids")


def token_file(folder: Path, tokens: torch.Tensor, key: str = "tokens") -> str:
    path = folder / "ids.safetensors"
    save_file({key: tokens.contiguous()}, path)
    return str(path)


def drawn(seed: int = 0, nsamples: int = 20, seqlen: int = 6, count: int = 500) -> CalibrationSet:
    return TextWindows(Ids(count), nsamples, seqlen, seed).sample(None)


def documents(folder: Path, texts: Sequence[str]) -> DataSet:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataSet("org/name", local=("rows.jsonl",), data_dir=str(folder))


def windows(
    folder: Path, texts: Sequence[str], nsamples: int = 100, seqlen: int = 5, seed: int = 0
) -> tuple[CalibrationSet, list[str]]:
    """Windows inside documents, and the text of each."""
    tokenizer = tiny.tokenizer()
    samples = DocumentWindows(documents(folder, texts), nsamples, seqlen, seed).sample(tokenizer)
    return samples, tokenizer.batch_decode(samples.tokens_NL)


Draw = Callable[..., CalibrationSet]


@pytest.fixture(params=["text", "document"])
def draw(request: pytest.FixtureRequest, tmp_path: Path) -> Draw:
    """Draws samples of a seed: windows of one text, or windows inside documents."""
    if request.param == "text":
        return drawn
    texts = [LETTERS * 20, CAPITALS, "xyz", DIGITS * 10]
    return lambda seed, nsamples=20: windows(tmp_path, texts, nsamples, seed=seed)[0]


def test_the_seed_alone_decides_on_the_samples(draw: Draw) -> None:
    """Drawing neither heeds nor disturbs other random numbers."""
    torch.manual_seed(1)
    first = draw(seed=3)
    after_drawing = torch.rand(1)
    torch.manual_seed(2)
    again = draw(seed=3)
    assert torch.equal(first.tokens_NL, again.tokens_NL) and first.digest == again.digest
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after_drawing)
    assert len({draw(seed=seed).digest for seed in range(5)}) == 5


def test_fewer_samples_are_the_first_of_more(draw: Draw) -> None:
    """So a study of the number of samples adds samples and changes none."""
    assert torch.equal(draw(seed=0, nsamples=5).tokens_NL, draw(seed=0, nsamples=20).tokens_NL[:5])


def test_samples_are_windows_of_the_text() -> None:
    samples = drawn()
    assert samples.tokens_NL.shape == (20, 6)
    assert samples.tokens_NL.dtype == torch.int64
    for sample in samples.tokens_NL.tolist():
        assert sample == list(range(sample[0], sample[0] + 6))
    assert (samples.source, samples.seed) == ("500 ids", 0)


def test_every_start_can_be_drawn_the_last_one_too() -> None:
    starts = {sample[0] for sample in drawn(nsamples=200, seqlen=6, count=9).tokens_NL.tolist()}
    assert starts == {0, 1, 2, 3}
    assert drawn(nsamples=200, seqlen=6, count=9).distinct == 4
    assert drawn(nsamples=2, seqlen=6, count=6).tokens_NL.tolist() == [list(range(6))] * 2


def test_the_digest_is_that_of_values_and_shape_and_not_of_memory() -> None:
    ids = torch.arange(8).view(2, 4)
    changed = ids.clone()
    changed[1, 1] += 1
    assert len({CalibrationSet(one, "").digest for one in (ids, ids.view(4, 2), changed)}) == 3
    assert CalibrationSet(ids.T.contiguous().T, "").digest == CalibrationSet(ids, "").digest


def test_a_text_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(UserError, match=r"^seqlen must be at most 5, the tokens of the text \(5 ids\), not 6$"):
        drawn(seqlen=6, count=5)


def test_offline_calibration_does_not_see_the_evaluation_part() -> None:
    assert calibration.offline_windows(nsamples=2, seqlen=8).text == OfflineText("calibration")


def test_text_files_are_joined_by_a_blank_line_in_the_order_of_their_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {"b.md": "second", "a.txt": "first", "sub/c.raw": "thírd", "d.py": "no text"}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    whole = "first\n\nsecond\n\nthírd"
    length = len(whole.encode())
    samples = calibration.text_windows(str(tmp_path), nsamples=1, seqlen=length).sample(tokenizer)
    assert tokenizer.decode(samples.tokens_NL[0]) == whole
    by_pattern = calibration.text_windows(str(tmp_path / "*.txt"), nsamples=1, seqlen=5).sample(tokenizer)
    assert tokenizer.decode(by_pattern.tokens_NL[0]) == "first"


def test_what_is_no_text_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = calibration.text_windows(str(tmp_path))
    assert complaint(lambda: made.sample(tokenizer)).startswith("path must be text files or a folder of them; ")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    assert complaint(lambda: made.sample(tokenizer)).startswith("path must be UTF-8 text files")
    (tmp_path / "a.txt").write_text("text")
    assert complaint(lambda: made.sample(None)).startswith("the model has no tokenizer")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_token_samples_are_the_first_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    ids = torch.arange(24).view(4, 6)
    path = token_file(tmp_path, ids.to(dtype))
    samples = TokenSamples(path).sample(None)
    assert torch.equal(samples.tokens_NL, ids)
    assert samples.digest == CalibrationSet(ids, "elsewhere").digest
    assert samples.seed is None
    assert torch.equal(TokenSamples(path, nsamples=3).sample(None).tokens_NL, ids[:3])
    assert torch.equal(TokenSamples(path, nsamples=3, seqlen=4).sample(None).tokens_NL, ids[:3, :4])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.arange(6), r"^path must hold 'tokens' of shape \[samples, tokens\]; .* has \[6\]$"),
        (torch.zeros(0, 6, dtype=torch.int64), r"^path must hold 'tokens' of shape .* has \[0, 6\]$"),
        (torch.zeros(3, 1, dtype=torch.int64), r"^path must hold samples of at least 2 tokens; .* has \[3, 1\]$"),
        (torch.zeros(3, 6), r"^path must hold integers under 'tokens'; .* has torch.float32$"),
        (torch.zeros(3, 6, dtype=torch.bool), r"^path must hold integers under 'tokens'; .* has torch.bool$"),
    ],
)
def test_token_samples_of_another_kind_are_refused(tmp_path: Path, tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenSamples(token_file(tmp_path, tokens)).sample(None)


def test_more_samples_than_the_file_has_are_refused(tmp_path: Path) -> None:
    path = token_file(tmp_path, torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(UserError, match=r"^nsamples must be at most 3, the samples of "):
        TokenSamples(path, nsamples=4).sample(None)
    with pytest.raises(UserError, match=r"seqlen must be at most \d+, the tokens of a sample"):
        TokenSamples(path, seqlen=1000).sample(None)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^path must be a safetensors file of token ids; .* is not there$"):
        TokenSamples(str(tmp_path / "nothing")).sample(None)
    with pytest.raises(UserError, match=r"^path must hold the key 'tokens'; .* has ids$"):
        TokenSamples(token_file(tmp_path, torch.zeros(3, 6, dtype=torch.int64), key="ids")).sample(None)
    (tmp_path / "text").write_text("no safetensors file")
    with pytest.raises(UserError, match=r"^path must be a safetensors file of token ids; .* is none"):
        TokenSamples(str(tmp_path / "text")).sample(None)


# Windows inside documents


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda lengths: max(lengths) > 2),
    st.integers(0, 2**63 - 1),
    st.data(),
)
def test_every_sample_lies_inside_one_document_of_more_than_seqlen(
    lengths: list[int], seed: int, data: st.DataObject
) -> None:
    seqlen = data.draw(st.integers(2, max(lengths) - 1))
    texts = ["".join(chr(33 + (i * 7 + j * (i + 1)) % 94) for j in range(length)) for i, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        samples, found = windows(Path(folder), texts, nsamples=8, seqlen=seqlen, seed=seed)
    assert samples.tokens_NL.shape == (8, seqlen)
    assert samples.tokens_NL.dtype == torch.int64
    for window in found:
        assert any(window in text for text in texts if len(text) > seqlen)


def test_every_long_document_and_every_start_gets_drawn(tmp_path: Path) -> None:
    _, found = windows(tmp_path, [LETTERS, CAPITALS, "", DIGITS, "xyz"], nsamples=400, seqlen=5)
    assert set(found) == {LETTERS[i : i + 5] for i in range(4)} | {DIGITS[i : i + 5] for i in range(3)}


def test_documents_count_alike_however_long_they_are(tmp_path: Path) -> None:
    _, found = windows(tmp_path, ["a" * 500, *(["short"] * 50), "b" * 6], nsamples=400, seqlen=5)
    assert 120 < found.count("bbbbb") < 280


def test_document_windows_say_where_they_come_from(tmp_path: Path) -> None:
    samples, _ = windows(tmp_path, [LETTERS], nsamples=2, seed=7)
    assert samples.source == f"{tmp_path / 'rows.jsonl'}, train split, column text"
    assert samples.seed == 7


@pytest.mark.parametrize(("seqlen", "longest"), [(8, 8), (9, 8), (2048, 8)])
def test_documents_that_are_all_too_short_are_refused(tmp_path: Path, seqlen: int, longest: int) -> None:
    assert complaint(lambda: windows(tmp_path, [CAPITALS, LETTERS, "", DIGITS], seqlen=seqlen)) == (
        f"seqlen must be below {longest}, the tokens of the longest document in "
        f"{tmp_path / 'rows.jsonl'}, train split, column text, not {seqlen}"
    )


# A data set of the hub


def test_a_data_set_is_drawn_from_by_document_or_as_one_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = documents(tmp_path, [LETTERS, "", DIGITS])
    place = {"local": data.local, "data_dir": data.data_dir, "nsamples": 300, "seqlen": 5, "seed": 3}
    by_document = calibration.hub_windows("org/name", **place).sample(tokenizer)
    assert by_document.digest == windows(tmp_path, [LETTERS, "", DIGITS], 300, 5, 3)[0].digest
    for separator in (" ", "\n\n"):
        settings = place if separator == " " else place | {"separator": separator}
        by_text = calibration.hub_windows("org/name", windows="text", **settings).sample(tokenizer)
        whole = separator.join([LETTERS, "", DIGITS])
        assert set(tokenizer.batch_decode(by_text.tokens_NL)) == {whole[i : i + 5] for i in range(len(whole) - 4)}
        assert (by_text.source, by_text.seed) == (by_document.source, 3)


def test_short_rows_are_of_use_as_one_text_only(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = documents(tmp_path, ["no", "it", "was"])
    place = {"local": data.local, "data_dir": data.data_dir, "nsamples": 1, "seqlen": 9}
    by_text = calibration.hub_windows("org/name", windows="text", **place).sample(tokenizer)
    assert tokenizer.decode(by_text.tokens_NL[0]) == "no it was"
    sentence = complaint(lambda: calibration.hub_windows("org/name", **place).sample(tokenizer))
    assert sentence.startswith("seqlen must be below 3, ")
    sentence = complaint(
        lambda: calibration.hub_windows("org/name", windows="text", **place | {"seqlen": 10}).sample(tokenizer)
    )
    assert sentence.startswith("seqlen must be at most 9, ")


def test_every_setting_of_a_data_set_reaches_it() -> None:
    about = {"config": "raw", "revision": "1a2b", "files": "a.json.gz", "local": ("a", "b"), "data_dir": "folder"}
    expected = DataSet("org/name", "test", "sentence", **about)
    by_document = calibration.hub_windows("org/name", "test", "sentence", **about, save="a.safetensors")
    by_text = calibration.hub_windows("org/name", "test", "sentence", **about, windows="text", save="a.safetensors")
    assert by_document == DocumentWindows(expected, save="a.safetensors")
    assert isinstance(by_text, TextWindows) and by_text.text.data == expected
    assert by_text.save == "a.safetensors"


@pytest.mark.parametrize("how", ["document", "text"])
def test_a_mistake_in_the_data_set_is_told_by_the_setting_that_is_wrong(
    tmp_path: Path, how: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = documents(tmp_path, [LETTERS])
    made = calibration.hub_windows("org/name", column="sentence", local=data.local, data_dir=data.data_dir, windows=how)
    assert complaint(lambda: made.sample(tokenizer)).startswith(f"column must be a column of {tmp_path}")


# A token before every window


def with_bos(own: bool) -> PreTrainedTokenizerBase:
    """Bytes as ids, and a BOS token, which the tokenizer may put before a text by itself."""
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<s>"})
    if own:
        template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
        made.backend_tokenizer.post_processor = template
    return made


@pytest.mark.parametrize("how", ["document", "text"])
@pytest.mark.parametrize("own", [False, True], ids=["bare texts", "texts with BOS"])
def test_every_sample_can_begin_with_bos_which_counts_as_one_of_its_tokens(tmp_path: Path, how: str, own: bool) -> None:
    data, tokenizer = documents(tmp_path, [LETTERS]), with_bos(own)
    place = {"local": data.local, "data_dir": data.data_dir, "nsamples": 200, "seqlen": 5}
    tokens_NL = calibration.hub_windows("org/name", windows=how, bos=True, **place).sample(tokenizer).tokens_NL
    assert tokens_NL.shape == (200, 5)
    assert (tokens_NL[:, 0] == tokenizer.bos_token_id).all()
    assert set(tokenizer.batch_decode(tokens_NL[:, 1:])) == {LETTERS[i : i + 4] for i in range(len(LETTERS) - 3)}


@pytest.mark.parametrize("how", ["document", "text"])
def test_bos_takes_the_place_of_a_token_where_a_text_is_short(tmp_path: Path, how: str) -> None:
    data, tokenizer = documents(tmp_path, [DIGITS]), with_bos(own=True)
    place = {"local": data.local, "data_dir": data.data_dir, "nsamples": 3, "bos": True, "windows": how}
    longest = len(DIGITS) + (how == "text")
    assert calibration.hub_windows("org/name", **place, seqlen=longest).sample(tokenizer).tokens_NL.shape == (
        3,
        longest,
    )
    sentence = complaint(lambda: calibration.hub_windows("org/name", **place, seqlen=longest + 1).sample(tokenizer))
    bound = "below" if how == "document" else "at most"
    assert sentence.startswith(f"seqlen must be {bound} {len(DIGITS) + 1}, ")


@pytest.mark.parametrize("how", ["document", "text"])
def test_bos_is_refused_where_the_tokenizer_has_none(
    tmp_path: Path, how: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = documents(tmp_path, [LETTERS])
    made = calibration.hub_windows("org/name", bos=True, local=data.local, data_dir=data.data_dir, windows=how)
    assert complaint(lambda: made.sample(tokenizer)) == (
        "bos must be false, the model's tokenizer has no beginning-of-sequence token"
    )


# Kept samples


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_kept_samples_can_be_used_again_and_say_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/samples.safetensors"
    samples = drawn(seed=5)
    save_samples(samples, path)
    again = TokenSamples(str(path)).sample(None)
    assert torch.equal(again.tokens_NL, samples.tokens_NL)
    assert again.digest == samples.digest
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"source": "500 ids", "seed": "5", "digest": samples.digest}
    save_samples(TokenSamples(str(path), nsamples=3).sample(None), path.with_stem("part"))
    assert torch.equal(TokenSamples(str(path.with_stem("part"))).sample(None).tokens_NL, samples.tokens_NL[:3])
    assert sorted(file.name for file in path.parent.iterdir()) == ["part.safetensors", "samples.safetensors"]
    flip(path)
    assert complaint(lambda: TokenSamples(str(path)).sample(None)) == (
        f"path must be a file as calibration.save wrote it; {path} is damaged"
    )


def test_the_same_samples_may_be_kept_twice_but_others_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "samples.safetensors"
    save_samples(drawn(seed=1), path)
    kept = path.read_bytes()
    save_samples(drawn(seed=1), path)
    for other in (drawn(seed=2), drawn(seed=1, nsamples=19), drawn(seed=1, seqlen=7)):
        assert complaint(lambda other=other: save_samples(other, path)) == (
            f"save must not be a file with other samples in it, but there is {path}; choose another"
        )
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", ["a text", "other tensors", "a folder"])
def test_what_is_no_file_of_samples_is_not_overwritten(tmp_path: Path, there: str) -> None:
    path = tmp_path / "ids.safetensors"
    if there == "a folder":
        path.mkdir()
    elif there == "a text":
        path.write_text("precious")
    else:
        token_file(tmp_path, torch.zeros(3), key="weights")
    before = path.read_bytes() if path.is_file() else b""
    sentence = complaint(lambda: save_samples(drawn(), path))
    assert (path.read_bytes() if path.is_file() else b"") == before
    assert sentence.startswith("save must ")
    assert str(path) in sentence


def test_samples_that_cannot_be_kept_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "samples.safetensors"
    with full_disk(room=400):
        sentence = complaint(lambda: save_samples(drawn(), path))
    assert sentence.startswith("save must be a file that can be written; ")
    assert not list(tmp_path.iterdir())
    save_samples(drawn(), path)
    assert TokenSamples(str(path)).sample(None).digest == drawn().digest


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
def test_half_written_samples_have_no_name_and_are_taken_away(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.safetensors"

    def half(tensors: object, where: Path, metadata: object) -> None:
        where.write_bytes(b"half")
        assert not path.exists()
        raise error

    monkeypatch.setattr(calibration, "save_file", half)
    with pytest.raises((UserError, KeyboardInterrupt)):
        save_samples(drawn(), path)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    sentence = complaint(lambda: save_samples(drawn(), tmp_path / "file/samples.safetensors"))
    assert sentence.startswith("save must be a file that can be written; ")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["samples", "samples.pt", "samples.safetensors/", "safetensors"])
@pytest.mark.parametrize(
    "make",
    [
        lambda name: calibration.offline_windows(save=name),
        lambda name: calibration.text_windows("folder", save=name),
        lambda name: calibration.hub_windows("org/name", save=name),
        lambda name: calibration.hub_windows("org/name", windows="text", save=name),
        lambda name: TokenSamples("ids.safetensors", save=name),
    ],
    ids=["offline", "text", "documents", "rows", "tokens"],
)
def test_a_file_to_keep_samples_in_is_named_as_one(make: Callable[[str], object], name: str) -> None:
    assert complaint(lambda: make(name)) == f"save must be a file name that ends in .safetensors, not {name!r}"
