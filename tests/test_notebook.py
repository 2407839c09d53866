"""The calls around `prune`, and the example that people copy: from the name of a model to a figure."""

import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import barber
from barber import UserError
from tests import tiny

ROOT = Path(__file__).parents[1]
TEXT = "It is a truth universally acknowledged, that bytes are as good as any other tokens. "


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return tiny.model(vocab_size=256)


def test_the_example_of_the_readme_gives_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model(vocab_size=256, max_position_embeddings=512).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (block,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        if "perplexity" in code
    ]
    assert len(block.strip().splitlines()) <= 12 and block in (ROOT / "docs" / "prune.md").read_text(encoding="utf-8")
    exec(re.sub(r'name = ".*"', f"name = {str(tmp_path)!r}", block), {})
    dense, pruned = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert dense > 1 and pruned > 1 and dense != pruned


def test_samples_come_from_texts_a_path_or_a_name(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    (tmp_path / "text.txt").write_text(TEXT * 5, encoding="utf-8")
    drawn = barber.calibrate(tokenizer, [TEXT * 5], nsamples=4, seqlen=12, seed=3)
    assert drawn.shape == (4, 12) and drawn.dtype == torch.int64
    assert torch.equal(drawn, barber.calibrate(tokenizer, tmp_path / "text.txt", 4, 12, 3))
    assert not torch.equal(drawn, barber.calibrate(tokenizer, [TEXT * 5], 4, 12, 4))
    named = barber.calibrate(tokenizer, "offline", 4, 12, 3)
    assert torch.equal(named, barber.offline_windows(4, 12, 3).sample(tokenizer).tokens_NL)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"texts": "wikitext"}, "^texts must be .* there is no 'wikitext', did you mean wikitext2"),
        (
            {"texts": "A text itself."},
            "^texts must be a list of texts, a path .*; there is c4, offline, ptb",
        ),
        ({"texts": [[1, 2]]}, "^texts must be .* not a list that has a list"),
        ({"texts": {"text": [TEXT]}}, "^texts must be .* not a dict"),
        ({"texts": 3}, "^texts must be .* not 3"),
        ({"texts": ["short"]}, "^seqlen must be at most 5, the tokens of the text"),
        ({"tokenizer": "gpt2"}, "^tokenizer must be one of transformers"),
        ({"nsamples": 1.5}, "^nsamples must be a whole number, not 1.5"),
        ({"seqlen": 1}, "^seqlen must be at least 2"),
    ],
)
def test_what_gives_no_samples(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        barber.calibrate(**{"tokenizer": tiny.tokenizer(), "texts": [TEXT], "nsamples": 2, "seqlen": 8} | given)


def test_perplexity_is_that_of_every_windows_next_tokens(model: transformers.PreTrainedModel) -> None:
    tokens_NL = tiny.tokens(4, 16)
    with torch.no_grad():
        expected = torch.stack([model(one[None], labels=one[None]).loss for one in tokens_NL]).mean().exp().item()
    model.train()
    assert barber.perplexity(model, tokens_NL) == pytest.approx(expected, rel=1e-5)
    assert model.training
    text_T = torch.cat([tokens_NL.flatten(), torch.tensor([5])])  # whose last token fills no window
    for text in (text_T, text_T[None]):
        assert barber.perplexity(model, text, seqlen=16, batch_size=1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokens": tiny.tokens()[0]}, "^seqlen has to be given for the ids of one text"),
        ({"seqlen": 8}, r"^seqlen is for the ids of one text, not for tokens of shape \[6, 16\]"),
        ({"tokens": tiny.tokens()[0], "seqlen": 17}, "^seqlen must be at most 16"),
        ({"tokens": tiny.tokens()[:, :1]}, "^tokens must be windows of two tokens at least"),
        ({"tokens": {"input_ids": tiny.tokens()}}, "^tokens must be .* give its input_ids"),
        ({"tokens": tiny.tokens() + 300}, "^tokens holds token id"),
        ({"tokens": tiny.tokens(2, 65)}, "^tokens gives samples of 65 tokens"),
        ({"device": "tpu"}, "^device must be auto"),
        ({"progress": 1}, "^progress must be True or False"),
    ],
)
def test_what_gives_no_perplexity(model: transformers.PreTrainedModel, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        barber.perplexity(**{"model": model, "tokens": tiny.tokens()} | given)


def test_bars_say_how_far_it_is(monkeypatch: pytest.MonkeyPatch, model: transformers.PreTrainedModel) -> None:
    from rich import progress

    told: dict[str, tuple[float, float | None]] = {}

    def note(self: progress.Progress, task: progress.TaskID, **_: Any) -> None:
        update(self, task, **_)
        told[self.tasks[task].description] = self.tasks[task].completed, self.tasks[task].total

    update = progress.Progress.update
    monkeypatch.setattr(progress.Progress, "update", note)
    barber.perplexity(model, tiny.tokens(), progress=True)
    barber.allocate(model, tiny.tokens(), pattern=0.5, allocation="owl", progress=True)
    barber.prune(model, tiny.tokens(), pattern=0.5, pruner="wanda", progress=True)
    assert told == {"Measuring perplexity": (6, 6), "Allocating sparsity": (2, 2), "Pruning, block by block": (4, 4)}


def test_a_bar_without_rich_is_refused_before_anything_is_changed(
    monkeypatch: pytest.MonkeyPatch, model: transformers.PreTrainedModel
) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"^progress needs rich, which is not installed: pip install rich"):
        barber.prune(model, tiny.tokens(), pattern=0.5, pruner="wanda", progress=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_report_is_a_few_lines(model: transformers.PreTrainedModel) -> None:
    report = barber.prune(model, tiny.tokens(), pattern=0.5, pruner="wanda", rebuild=barber.Barber(alpha=0.9))
    lines = repr(report).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["pruned", "zeros", "exchanged", "block error", "time"]
    assert "14 linears in 4 blocks of 2 layers" in lines[0] and "50.00%, 7,680 of 15,360 weights" in lines[1]
    assert all(line.split("  ")[-1].strip() in report._repr_html_() for line in lines)


def test_what_is_public_is_what_a_notebook_completes() -> None:
    assert dir(barber) == sorted([*barber.__all__, "__version__"])
    assert all(hasattr(barber, name) for name in dir(barber))
    assert barber.__version__ == version("llm-barber")
