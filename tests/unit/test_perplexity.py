"""Perplexity against a plain loop over windows and tokens."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from barber.errors import NumericsError, UserError
from barber.evals import Perplexity
from barber.texts import TokenFile
from tests import tiny

CPU = torch.device("cpu")
LENGTH = 12


@dataclass(frozen=True)
class Ids:
    """A text that is tokenised already."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} ids"

    def tokens(self, tokenizer: None) -> torch.Tensor:
        return tiny.tokens(1, self.count, seed=5)[0]


def window_losses(model: PreTrainedModel, tokens_T: torch.Tensor, length: int) -> list[float]:
    """The mean cross-entropy of every whole window, token by token in float64."""
    losses = []
    for start in range(0, len(tokens_T) - length + 1, length):
        window = tokens_T[start : start + length]
        with torch.no_grad():
            logits_LV = model(input_ids=window[None]).logits[0].double()
        surprises = [-logits_LV[t].log_softmax(0)[window[t + 1]].item() for t in range(length - 1)]
        losses.append(sum(surprises) / len(surprises))
    return losses


def evaluate(perplexity: Perplexity, model: PreTrainedModel, progress: Callable[[int], None] = lambda _: None):
    return perplexity.evaluate(model, perplexity.windows(None), CPU, progress)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity_is_the_exponential_of_the_mean_over_windows(family: str, batch_size: int) -> None:
    model, text = tiny.model(family), Ids(5 * LENGTH + 7)
    losses = window_losses(model, text.tokens(None), LENGTH)
    results = evaluate(Perplexity(text, LENGTH, batch_size=batch_size), model)
    assert results["perplexity"] == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-6)
    assert results["nll_per_token"] == pytest.approx(statistics.mean(losses), rel=1e-6)
    assert results["nll_standard_error"] == pytest.approx(statistics.stdev(losses) / math.sqrt(5), rel=1e-4)
    assert (results["windows"], results["seqlen"], results["text"]) == (5, LENGTH, "67 ids")


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = tiny.model("llama")
    model.lm_head.weight.data.zero_()
    assert evaluate(Perplexity(Ids(60), LENGTH), model)["perplexity"] == pytest.approx(tiny.VOCABULARY, rel=1e-6)


@pytest.mark.parametrize(("count", "windows"), [(LENGTH, 1), (2 * LENGTH - 1, 1), (2 * LENGTH, 2), (3 * LENGTH + 5, 3)])
def test_what_does_not_fill_a_window_is_dropped(count: int, windows: int) -> None:
    text = Ids(count)
    expected = [text.tokens(None)[i * LENGTH : (i + 1) * LENGTH].tolist() for i in range(windows)]
    assert Perplexity(text, LENGTH).windows(None).tolist() == expected


def test_a_limit_takes_the_first_windows_and_is_recorded() -> None:
    perplexity = Perplexity(Ids(60), LENGTH, max_windows=2)
    assert torch.equal(perplexity.windows(None), Perplexity(Ids(60), LENGTH).windows(None)[:2])
    results = evaluate(perplexity, tiny.model("llama"))
    assert (results["windows"], results["max_windows"]) == (2, 2)


def test_one_window_has_no_standard_error() -> None:
    results = evaluate(Perplexity(Ids(LENGTH), LENGTH), tiny.model("llama"))
    assert results["nll_standard_error"] is None
    assert results["perplexity"] is not None


def test_progress_counts_every_window() -> None:
    finished: list[int] = []
    evaluate(Perplexity(Ids(5 * LENGTH), LENGTH, batch_size=2), tiny.model("llama"), finished.append)
    assert finished == [2, 2, 1]


def test_a_perplexity_beyond_all_numbers_leaves_the_loss() -> None:
    model = tiny.model("llama")
    model.lm_head.weight.data.mul_(1e5)
    results = evaluate(Perplexity(Ids(60), LENGTH), model)
    assert results["perplexity"] is None
    assert results["nll_per_token"] > 700


def test_a_loss_that_is_no_number_stops_the_evaluation() -> None:
    model = tiny.model("llama")
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(NumericsError, match="the evaluated model's loss is NaN or infinite"):
        evaluate(Perplexity(Ids(60), LENGTH), model)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    message = r"^seqlen must be at most 11, the tokens of the text \(11 ids\), not 12$"
    with pytest.raises(UserError, match=message):
        Perplexity(Ids(LENGTH - 1), LENGTH).windows(None)


def test_a_text_that_cannot_be_read_is_named_by_its_key() -> None:
    with pytest.raises(UserError, match=r"^text\.path must be a safetensors file"):
        Perplexity(TokenFile("nowhere.safetensors"), LENGTH).windows(None)


@pytest.mark.parametrize(("field", "value", "least"), [("seqlen", 1, 2), ("max_windows", 0, 1), ("batch_size", 0, 1)])
def test_settings_out_of_range_are_refused(field: str, value: int, least: int) -> None:
    with pytest.raises(UserError, match=f"^{field} must be at least {least}, not {value}$"):
        Perplexity(Ids(60), **{field: value})
