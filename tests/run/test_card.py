"""The model card: what the hub reads of it, what it takes over from the dense model's own, and its figures."""

import json
import warnings
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from huggingface_hub import ModelCard

from barber import NM, Packaged, Pretrained, RandomModel, Unstructured
from barber.methods.patterns import Pattern
from barber.model.sources import ModelSource
from barber.run import origin
from barber.run.card import model_card
from barber.run.experiment import Experiment
from barber.run.origin import origin_of
from barber.run.record import Sparsity
from tests import records

HALF = Unstructured(0.5)
THEIRS = (
    "---\nlicense: other\nlicense_name: theirs\nlicense_link: https://x\ntags: [a]\nbase_model: B/C\n---\n# Theirs\n"
)


def card(pattern: Pattern = HALF, model: ModelSource | None = None, **changes: Any) -> str:
    model = model or RandomModel("llama")
    experiment = cast(Experiment, SimpleNamespace(name="a_run", model=model, pattern=pattern, update=None))
    return model_card(experiment, records.record(**changes))


def front_matter(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """What yaml and the hub's own library make of it alike, without a warning."""
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read: dict[str, Any] = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert not caplog.records
    assert yaml.safe_load(text.split("---\n")[1]) == read
    return read


def folder(tmp_path: Path, card: str | None, **config: Any) -> Pretrained:
    place = tmp_path / "My-Model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if card is not None:
        (place / "README.md").write_text(card, encoding="utf-8")
    return Pretrained(str(place), local=True)


def test_the_hub_reads_where_the_model_is_from_and_how_sparse_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Packaged("package", "x.gguf", "pip", base_model="ORG/NAME", license="apache-2.0")
    read = front_matter(card(NM(2, 4), model), tmp_path, caplog)
    assert read == {
        "base_model": "ORG/NAME",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "sparse", "sparsity-50", "2of4", "pruning", "llm-barber"],
    }


@pytest.mark.parametrize(
    ("sparsity", "tag"),
    [
        (Sparsity(0.625, 625, 1000, 0), "sparsity-62.5"),
        (Sparsity(0.49999, 49999, 100_000, 0), "sparsity-50"),
        (Sparsity(0.5, 50, 100, 0, overall=0.4), "sparsity-40"),
    ],
)
def test_the_tag_has_the_sparsity_of_the_whole(
    sparsity: Sparsity, tag: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read = front_matter(card(sparsity=sparsity), tmp_path, caplog)
    assert tag in read["tags"]
    assert not read.keys() & {"base_model", "license"}


def test_a_folder_hands_on_its_licence_and_its_repository_where_it_says_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = folder(tmp_path, THEIRS, _name_or_path="ORG/NAME")
    read = front_matter(card(model=model), tmp_path, caplog)
    theirs = {"license": "other", "license_name": "theirs", "license_link": "https://x", "base_model": "ORG/NAME"}
    assert {key: read[key] for key in theirs} == theirs
    assert "My-Model, pruned to" in card(model=model)


@pytest.mark.parametrize(
    "theirs", [None, "", "# No front matter\n", "---\n- a list\n---\n", "---\n{\n---\n", "---\nlicense: [1]\n---\n"]
)
@pytest.mark.parametrize("name", [None, "", "llama", "/home/somebody/ORG/NAME", "./NAME", 3])
def test_what_is_not_said_is_left_out(theirs: str | None, name: object, tmp_path: Path) -> None:
    assert origin_of(folder(tmp_path, theirs, **({} if name is None else {"_name_or_path": name}))) == {}


def test_of_the_hub_the_card_in_its_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--ORG--NAME"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc", encoding="utf-8")
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (snapshot / "config.json").write_text("{}", encoding="utf-8")
    look = origin.try_to_load_from_cache
    monkeypatch.setattr(origin, "try_to_load_from_cache", lambda *a, **k: look(*a, **k, cache_dir=tmp_path))
    expected = {"base_model": "ORG/NAME", "license": "mit"}
    assert origin_of(Pretrained("ORG/NAME")) == origin_of(Pretrained(str(snapshot), local=True)) == expected
    assert origin_of(Pretrained("ORG/OTHER")) == {"base_model": "ORG/OTHER"}


def test_results_stand_with_their_errors_and_their_protocol() -> None:
    text = card()
    assert "| | dense | rebuilt |" in text
    assert "| perplexity, text | 18.00 ± 0.50 | 20.00 ± 0.50 |" in text
    assert "| KL divergence from the dense model, text | - | 0.2500 ± 0.0100 |" in text
    assert "| acc, boolq | - | 50.00% ± 10.00% |" in text
    assert "- text: all 4 windows of 16 tokens of a file; SHA-256 of the token ids `9f`" in text
    assert "- boolq, wsc: the first 10 documents of every task, lm-eval 0.4.13" in text
    assert "Calibrated on 16 samples of 64 tokens from c4.\nSHA-256 of their token ids: `c1`." in text
    assert "## Results" not in card(results={})


def test_the_packaged_models_say_what_they_are_made_of() -> None:
    config = yaml.safe_load(files("barber.conf").joinpath("model/smollm2-135m.yaml").read_text(encoding="utf-8"))
    del config["_target_"]
    assert origin_of(Packaged(**config)) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
    }
