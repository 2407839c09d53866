"""Perplexity against a plain loop over windows and tokens."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.data.texts import Text, TextFiles, TokenFile
from barber.errors import NumericsError, UserError
from barber.evals.evaluation import Evaluation, evaluation
from barber.evals.placement import Placement
from barber.evals.results import PerplexityResult
from barber.evals.windows import WindowProtocol
from barber.runtime.plain import plain
from tests import tiny
from tests.evals.measuring import Ids, quiet

CPU = torch.device("cpu")
LENGTH = 12
BOS = 1

# gemma2 caps its logits, cohere and granite scale them, opt's positions have an offset, the others are plain
families = pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "cohere", "granite"])
batch_sizes = pytest.mark.parametrize("batch_size", [1, 3])
placements = pytest.mark.parametrize("placement", ["whole", "layers"])


def tokenizer() -> PreTrainedTokenizerBase:
    """One whose BOS token is that of the tiny models."""
    made = tiny.tokenizer()
    made.bos_token = made.convert_ids_to_tokens(BOS)
    return made


def window_losses(
    model: PreTrainedModel, tokens_T: torch.Tensor, length: int, stride: int | None = None, bos: bool = False
) -> list[list[float]]:
    """The surprise at every scored token, window by window, in float64: each token the first time that a window has it
    with something before it.
    """
    text, losses, known = tokens_T.tolist(), [], set()
    content = length - 1 if bos else length
    step = min(stride or length, content)
    for start in range(0, len(text) - content + 1, step):
        window = [BOS] * bos + text[start : start + content]
        with torch.no_grad():
            logits_LV = model(input_ids=torch.tensor([window])).logits[0].double()
        losses.append([])
        for t in range(1, length):
            place = start + t - bos
            if place not in known:
                known.add(place)
                losses[-1].append(-logits_LV[t - 1].log_softmax(0)[window[t]].item())
    return losses


def evaluate(
    model: PreTrainedModel,
    text: Text,
    windows: WindowProtocol | None = None,
    *,
    batch_size: int | None = None,
    placement: Placement = "whole",
    watch: Callable[[str, int], Callable[[int], None]] = quiet,
) -> PerplexityResult:
    """The results on one text, as a run has them."""
    spec = Evaluation(
        stages=["pruned"],
        texts={"text": text},
        windows=[windows or WindowProtocol(LENGTH)],
        batch_size=batch_size,
        placement=placement,
    )
    prepared = spec.prepare(tokenizer(), Path("nowhere"))
    results = prepared.measure("pruned", model, CPU, watch)
    assert results is not None and plain(results).keys() == {"perplexity"}
    return results.perplexity["text"]


@batch_sizes
@families
def test_perplexity_is_the_exponential_of_the_mean_over_windows(family: str, batch_size: int) -> None:
    model, text = tiny.model(family), Ids(5 * LENGTH + 7)
    losses = [statistics.mean(window) for window in window_losses(model, text.tokens(None).tokens_T, LENGTH)]
    results = evaluate(model, text, batch_size=batch_size)
    nll, error = statistics.mean(losses), statistics.stdev(losses) / math.sqrt(5)
    assert results.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert results.nll_per_token == pytest.approx(nll, rel=1e-6)
    assert results.nll_standard_error == pytest.approx(error, rel=1e-4)
    assert results.perplexity_standard_error == pytest.approx(math.exp(nll) * error, rel=1e-4)
    assert (results.windows, results.tokens, results.protocol.text) == (5, 5 * (LENGTH - 1), "67 ids")


@pytest.mark.parametrize("bos", [False, True], ids=["without BOS", "with BOS"])
@pytest.mark.parametrize("stride", [None, 1, 5, LENGTH - 1])
@batch_sizes
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_overlap_and_bos_are_those_of_the_plain_loop(
    family: str, batch_size: int, stride: int | None, bos: bool
) -> None:
    model, text = tiny.model(family), Ids(2 * LENGTH + 9)
    losses = window_losses(model, text.tokens(None).tokens_T, LENGTH, stride, bos)
    tokens = [loss for window in losses for loss in window]
    error = statistics.stdev(statistics.mean(window) for window in losses) / math.sqrt(len(losses))
    results = evaluate(model, text, WindowProtocol(LENGTH, stride, bos), batch_size=batch_size)
    assert results.perplexity == pytest.approx(math.exp(statistics.mean(tokens)), rel=1e-6)
    assert results.nll_standard_error == pytest.approx(error, rel=1e-4, abs=1e-6)
    assert (results.windows, results.tokens) == (len(losses), len(tokens))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_in_bfloat16_is_measured_in_float32(family: str) -> None:
    model, text = tiny.model(family).bfloat16(), Ids(5 * LENGTH)
    losses = [loss for window in window_losses(model, text.tokens(None).tokens_T, LENGTH) for loss in window]
    results = evaluate(model, text, batch_size=1)  # bfloat16 sums depend on the batch
    assert results.nll_per_token == pytest.approx(statistics.mean(losses), rel=1e-6)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = tiny.model("llama")
    model.lm_head.weight.data.zero_()
    assert evaluate(model, Ids(60)).perplexity == pytest.approx(tiny.VOCABULARY, rel=1e-6)


def test_a_limit_takes_the_first_windows_and_is_recorded() -> None:
    model = tiny.model("llama")
    limited = evaluate(model, Ids(60), WindowProtocol(LENGTH, max_windows=2))
    losses = window_losses(model, Ids(60).tokens(None).tokens_T, LENGTH)[:2]
    assert limited.nll_per_token == pytest.approx(statistics.mean(map(statistics.mean, losses)), rel=1e-6)
    assert (limited.windows, limited.protocol.max_windows) == (2, 2)


def test_windows_of_several_lengths_have_a_result_each() -> None:
    model, text = tiny.model("llama"), Ids(60)
    spec = evaluation(stages=["dense"], texts={"text": text}, seqlen=[LENGTH, 5], perplexity=True)
    found = spec.prepare(None, Path("nowhere")).measure("dense", model, CPU, quiet)
    assert found is not None
    for name, length in {"text": LENGTH, "text_5": 5}.items():
        losses = [loss for window in window_losses(model, text.tokens(None).tokens_T, length) for loss in window]
        assert found.perplexity[name].nll_per_token == pytest.approx(statistics.mean(losses), rel=1e-6)
        assert found.perplexity[name].protocol.seqlen == length
    assert found.perplexity.keys() == {"text", "text_5"}


def test_the_results_say_how_they_were_come_by() -> None:
    text, protocol = Ids(60), WindowProtocol(LENGTH, 5, True, 4)
    windows = protocol.cut(text, text.tokens(None), tokenizer())
    results = evaluate(tiny.model("llama"), text, protocol)
    assert results.protocol == windows.protocol
    assert results.digest == windows.digest


def test_one_window_has_no_standard_error() -> None:
    results = evaluate(tiny.model("llama"), Ids(LENGTH))
    assert results.nll_standard_error is None
    assert results.perplexity_standard_error is None
    assert results.perplexity is not None


def test_without_a_batch_size_the_results_are_the_same() -> None:
    model = tiny.model("llama")
    results = [plain(evaluate(model, Ids(90), batch_size=batch_size)) for batch_size in (None, 1)]
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert value == (pytest.approx(results[1][key], rel=1e-5) if isinstance(value, float) else results[1][key]), key


@pytest.mark.parametrize(("placement", "rounds"), [("whole", 1), ("layers", 3)])  # two layers and the logits
def test_progress_counts_every_window(placement: Placement, rounds: int) -> None:
    announced: list[tuple[str, int]] = []
    finished: list[int] = []

    def watch(what: str, steps: int) -> Callable[[int], None]:
        announced.append((what, steps))
        return finished.append

    evaluate(tiny.model("llama"), Ids(5 * LENGTH), batch_size=2, placement=placement, watch=watch)
    assert announced == [("pruned on text", 5 * rounds)]
    assert finished == [2, 2, 1] * rounds


def test_a_perplexity_beyond_all_numbers_leaves_the_loss() -> None:
    model = tiny.model("llama")
    model.lm_head.weight.data.mul_(1e5)
    results = evaluate(model, Ids(60))
    assert results.perplexity is None
    assert results.perplexity_standard_error is None
    assert results.nll_per_token > 700
    assert results.nll_standard_error > 0


@placements
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_loss_that_is_no_number_stops_the_evaluation(number: float, placement: Placement) -> None:
    model = tiny.model("llama")
    model.lm_head.weight.data[3] = number
    with pytest.raises(NumericsError, match="the evaluated model's loss is NaN or infinite"):
        evaluate(model, Ids(60), placement=placement)


@pytest.mark.parametrize(
    ("text", "key"), [(TokenFile("nowhere.safetensors"), "a safetensors file"), (TextFiles("nowhere"), "text files")]
)
def test_a_text_that_cannot_be_read_is_named_by_its_key(text: Text, key: str) -> None:
    with pytest.raises(UserError, match=rf"^texts\.text\.path must be {key}"):
        evaluate(tiny.model("llama"), text)


def test_a_batch_has_a_window_at_least() -> None:
    with pytest.raises(UserError, match=r"^batch_size must be at least 1, not 0$"):
        evaluate(tiny.model("llama"), Ids(60), batch_size=0)


def test_there_is_a_text_to_measure_on() -> None:
    with pytest.raises(UserError, match=r"^texts must name a text at least"):
        Evaluation(stages=["dense"], texts={}, windows=WindowProtocol())
