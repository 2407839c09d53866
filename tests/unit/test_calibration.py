"""The calibration set: drawn reproducibly, from nothing but the text it is said to come from."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from barber import calibration
from barber.calibration import CalibrationSet, TextWindows, TokenSamples
from barber.errors import UserError
from barber.models import RandomModel
from barber.texts import OfflineText


@dataclass(frozen=True)
class Ids:
    """A text that is tokenised already: the ids 0, 1, 2, ..."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} ids"

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
        return torch.arange(self.count)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """One that maps every byte to an id."""
    made = RandomModel("llama").tokenizer()
    assert made is not None
    return made


def token_file(folder: Path, tokens: torch.Tensor, key: str = "tokens") -> str:
    path = folder / "ids.safetensors"
    save_file({key: tokens.contiguous()}, path)
    return str(path)


def drawn(seed: int = 0, nsamples: int = 20, seqlen: int = 6, count: int = 500) -> CalibrationSet:
    return TextWindows(Ids(count), nsamples, seqlen, seed).sample(None)


def test_the_same_seed_draws_the_same_samples() -> None:
    assert torch.equal(drawn(seed=3).tokens_NL, drawn(seed=3).tokens_NL)
    assert drawn(seed=3).digest == drawn(seed=3).digest


def test_another_seed_draws_other_samples() -> None:
    assert len({drawn(seed=seed).digest for seed in range(5)}) == 5


def test_drawing_neither_heeds_nor_disturbs_other_random_numbers() -> None:
    torch.manual_seed(1)
    first = drawn().digest
    after_drawing = torch.rand(1)
    torch.manual_seed(2)
    assert drawn().digest == first
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after_drawing)


def test_fewer_samples_are_the_first_of_more() -> None:
    """So a study of the number of samples adds samples and changes none."""
    assert torch.equal(drawn(nsamples=5).tokens_NL, drawn(nsamples=20).tokens_NL[:5])


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
    assert drawn(nsamples=2, seqlen=6, count=6).tokens_NL.tolist() == [list(range(6))] * 2


def test_the_digest_tells_shapes_apart() -> None:
    ids = torch.arange(8)
    assert CalibrationSet(ids.view(2, 4), "").digest != CalibrationSet(ids.view(4, 2), "").digest
    changed = ids.clone()
    changed[5] += 1
    assert CalibrationSet(ids.view(2, 4), "").digest != CalibrationSet(changed.view(2, 4), "").digest


def test_the_digest_is_one_of_values_not_of_memory() -> None:
    ids = torch.arange(8).view(2, 4)
    assert CalibrationSet(ids.T.contiguous().T, "").digest == CalibrationSet(ids, "").digest


def test_a_text_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(UserError, match=r"^seqlen must be at most 5, the tokens of the text \(5 ids\), not 6$"):
        drawn(seqlen=6, count=5)


@pytest.mark.parametrize(("field", "value", "least"), [("nsamples", 0, 1), ("seqlen", 1, 2)])
def test_too_few_samples_or_tokens_are_refused(field: str, value: int, least: int) -> None:
    with pytest.raises(UserError, match=f"^{field} must be at least {least}, not {value}$"):
        TextWindows(Ids(10), **{field: value})


def test_offline_calibration_does_not_see_the_evaluation_part() -> None:
    assert calibration.offline(nsamples=2, seqlen=8).text == OfflineText("calibration")


def test_text_files_are_joined_by_a_blank_line_in_the_order_of_their_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {"b.md": "second", "a.txt": "first", "sub/c.raw": "thírd", "d.py": "no text"}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    whole = "first\n\nsecond\n\nthírd"
    length = len(whole.encode())
    samples = calibration.text(str(tmp_path), nsamples=1, seqlen=length).sample(tokenizer)
    assert tokenizer.decode(samples.tokens_NL[0]) == whole
    by_pattern = calibration.text(str(tmp_path / "*.txt"), nsamples=1, seqlen=5).sample(tokenizer)
    assert tokenizer.decode(by_pattern.tokens_NL[0]) == "first"


def test_a_folder_without_text_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"^path must be text files or a folder of them; .* has none$"):
        calibration.text(str(tmp_path)).sample(tokenizer)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"^path must be UTF-8 text files"):
        calibration.text(str(tmp_path)).sample(tokenizer)


def test_a_model_without_a_tokenizer_needs_token_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="the model has no tokenizer"):
        calibration.text(str(tmp_path)).sample(None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_token_samples_are_the_first_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    ids = torch.arange(24).view(4, 6)
    path = token_file(tmp_path, ids.to(dtype))
    samples = TokenSamples(path).sample(None)
    assert torch.equal(samples.tokens_NL, ids)
    assert samples.digest == CalibrationSet(ids, "elsewhere").digest
    assert samples.seed is None
    assert torch.equal(TokenSamples(path, nsamples=3).sample(None).tokens_NL, ids[:3])


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
    with pytest.raises(UserError, match=r"^nsamples must be at least 1, not 0$"):
        TokenSamples(path, nsamples=0)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^path must be a safetensors file of token ids; .* is not there$"):
        TokenSamples(str(tmp_path / "nothing")).sample(None)
    with pytest.raises(UserError, match=r"^path must hold the key 'tokens'; .* has ids$"):
        TokenSamples(token_file(tmp_path, torch.zeros(3, 6, dtype=torch.int64), key="ids")).sample(None)
    (tmp_path / "text").write_text("no safetensors file")
    with pytest.raises(UserError, match=r"^path must be a safetensors file of token ids; .* is none"):
        TokenSamples(str(tmp_path / "text")).sample(None)
