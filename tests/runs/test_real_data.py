"""A real model on a real text: the pruning papers' perplexity, by a loop that shares no code with the project."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.config import build
from barber.evals.evaluation import Evaluation, evaluation
from barber.runtime.cache import Cache

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
WIKITEXT = DATA / "wikitext-2-raw-v1" / "wiki.test.raw"
MODEL = OmegaConf.load(ROOT / "conf" / "model" / "smollm2-135m.yaml")
CPU = torch.device("cpu")
CACHE = Cache()  # for the ids of the text

pytestmark = [
    pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"there is no {WIKITEXT}"),
    pytest.mark.skipif(find_spec(MODEL.package) is None, reason=f"there is no package {MODEL.package}"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = build(OmegaConf.to_container(MODEL), "model").tokenizer()
    assert isinstance(made, PreTrainedTokenizerBase)
    return made


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = build(OmegaConf.to_container(MODEL), "model").load()
    assert isinstance(made, PreTrainedModel)
    return made


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The test split as the papers' code tokenises it: (1, T)."""
    lines = WIKITEXT.read_bytes().decode("utf-8").split("\n")[:-1]
    rows = [line + "\n" if line.strip() else "" for line in lines]  # as the hub has them
    assert len(rows) == 4358
    encoded: torch.Tensor = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    return encoded


def shipped(seqlen: int, max_windows: int | None = None) -> Evaluation:
    """Perplexity on the text that evals/text=wikitext2 gives."""
    text = OmegaConf.load(ROOT / "conf" / "evals" / "text" / "wikitext2.yaml")
    node = OmegaConf.to_container(OmegaConf.create({"data_dir": str(DATA), "text": text}), resolve=True)
    assert isinstance(node, dict)
    texts = {"wikitext2": build(node["text"], "text")}
    return evaluation(["dense"], texts, seqlen, max_windows=max_windows, perplexity=True)


def perplexity(model: PreTrainedModel, ids: torch.Tensor, seqlen: int, nsamples: int) -> float:
    """The papers' loop."""
    nlls = []
    for i in range(nsamples):
        window = ids[:, i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            logits = model(window).logits
        nlls.append(functional.cross_entropy(logits[0, :-1].float(), window[0, 1:]).item())
    return math.exp(sum(nlls) / nsamples)


@pytest.mark.parametrize(("seqlen", "max_windows"), [(512, 2), (128, 5)])
def test_perplexity_is_that_of_the_papers_loop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    seqlen: int,
    max_windows: int,
) -> None:
    prepared = shipped(seqlen, max_windows).prepare(tokenizer, Path("nowhere"), CACHE)
    measured = prepared.measure("dense", model, CPU, lambda what, steps: lambda done: None)
    assert measured is not None
    results = measured.perplexity["wikitext2"]
    expected = perplexity(model, ids, seqlen, max_windows)
    assert results.perplexity == pytest.approx(expected, rel=1e-4)
    assert (results.windows, results.tokens) == (max_windows, max_windows * (seqlen - 1))
    assert results.protocol.text_tokens == ids.numel()


@pytest.mark.parametrize("seqlen", [512, 2048])
def test_without_a_limit_there_are_as_many_windows_as_in_the_papers(
    tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, seqlen: int
) -> None:
    nsamples = ids.numel() // seqlen
    windows = shipped(seqlen).prepare(tokenizer, Path("nowhere"), CACHE).windows["wikitext2"]
    assert torch.equal(windows.tokens_NL, ids[0, : nsamples * seqlen].reshape(nsamples, seqlen))
