"""Whatever people give to the calls of the library: taken where it is clear what is meant, or refused in a sentence."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import barber
from barber import NM, Unstructured, UserError, Wanda
from barber.methods.patterns import Exactly
from barber.model.decoder import Decoder
from barber.walk import arguments
from tests import tiny
from tests.cli.running import built

IDS = {"input_ids": tiny.tokens()}
NAMES = [linear.name for linear in Decoder(tiny.model()).linears]

MODELS: dict[str, tuple[Any, str]] = {
    "a path": ("models/mine", r"load it first: AutoModelForCausalLM.from_pretrained\('models/mine'\)"),
    "a Path": (Path("mine"), "from_pretrained"),
    "no model": (torch.nn.Linear(2, 2), "loaded, not a Linear"),
    "the class": (AutoModelForCausalLM, "loaded, not the class AutoModelForCausalLM"),
    "without a head": (
        AutoModel.from_config(tiny.config()),
        "head, which a LlamaModel has not",
    ),
    "another head": (AutoModelForSequenceClassification.from_config(tiny.config()), "have a language-model head"),
    "in parallel": (torch.nn.DataParallel(tiny.model()), "not a DataParallel; give its .module"),
    "compiled": (torch.compile(tiny.model()), "before torch.compile, a LlamaForCausalLM; give its ._orig_mod"),
    "without weights": (tiny.model().to("meta"), "all of it is on the meta device; load it with from_pretrained"),
}
TOKENS: dict[str, tuple[Any, str]] = {
    "texts alone": (["a text", "another"], "for texts give tokenizer= as well, or use barber.calibrate"),
    "lists": ([[1, 2], [3, 4]], r"not a list; torch.tensor\(...\) makes it"),
    "an empty list": ([], "not a list"),
    "a dict": (IDS, "not a dict; give its input_ids"),
    "a loader": (torch.utils.data.DataLoader([IDS]), r"not a DataLoader; put its batches together: torch.cat"),
    "an array": (tiny.tokens().numpy(), r"not a ndarray; torch.tensor\(...\)"),
    "a tokenizer": (tiny.tokenizer(), r"; barber.calibrate\(tokenizer, texts\) makes some"),
    "a name": ("c4", "not 'c4'; barber.calibrate"),
    "one sample": (tiny.tokens()[0], r"integers of shape \[samples, tokens\], not torch.int64 \[16\]"),
    "yes and no": (tiny.tokens() > 5, "integers of shape"),
}
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "no pattern": ({"pattern": None}, r"^pattern must be 0.5, '2:4', Unstructured\(0.5\) or NM\(2, 4\), not None"),
    "a pattern's class": ({"pattern": NM}, "not the class NM"),
    "a pattern's name": ({"pattern": "unstructured"}, "not 'unstructured'"),
    "per cent": ({"pattern": 50}, "^pattern: sparsity must be at least 0 and below 1, not 50"),
    "4 of 2": ({"pattern": "4:2"}, r"^pattern: n must be below m \(2\), not 4"),
    "a linear's pattern": ({"pattern": {NAMES[0]: "half"}}, r"^pattern\['model.layers.0.self_attn.q_proj'\] must be"),
    "a linear that is none": (
        {"pattern": dict.fromkeys(NAMES, 0.5) | {NAMES[0].replace("proj", "porj"): 0.5}},
        "^pattern must name linears of the model, but has one for .*q_porj, did you mean .*layers.0.self_attn.q_proj",
    ),
    "a pruner's class": ({"pruner": Wanda}, r"^pruner must be .* not the class Wanda; write Wanda\(\)"),
    "no such pruner": ({"pruner": "wnada"}, "^pruner='wnada': no such name, did you mean wanda"),
    "no pruner": ({"pruner": None}, r"^pruner must be a method such as Wanda\(\) or 'wanda', not None"),
    "a step as pruner": ({"pruner": barber.Barber()}, "^pruner must be .* not a Barber"),
    "a pruner as step": ({"rebuild": [barber.Swaps(), Wanda()]}, r"^rebuild\[1\] must be a method such as Barber\(\)"),
    "a step's class": ({"rebuild": barber.Barber}, r"^rebuild must be .*; write Barber\(\)"),
    "no such step": ({"rebuild": ["swap"]}, "^rebuild='swap': no such name, did you mean swaps"),
    "no such schedule": ({"schedule": "fast"}, "^schedule must be paper or interleaved, not 'fast'"),
    "no device": ({"device": 0}, "^device must be auto, cpu, cuda"),
    "half a sample": ({"batch_size": 0.5}, "^batch_size must be a whole number, not 0.5"),
    "no sample": ({"batch_size": 0}, "^batch_size must be at least 1, not 0"),
    "a precision's name": ({"precision": "bfloat16"}, r"^precision must be a Precision\(.*not 'bfloat16'"),
    "a bar that is none": ({"progress": "yes"}, "^progress must be True or False, not 'yes'"),
    "no tokenizer": ({"tokens_NL": ["a text"], "tokenizer": "gpt2"}, "^tokenizer must be one of transformers .*'gpt2'"),
}


def prune(**given: Any) -> barber.Report:
    given = {"model": tiny.model(), "tokens_NL": tiny.tokens(), "pattern": 0.5, "pruner": "wanda"} | given
    return barber.prune(**given)


def allocate(**given: Any) -> Any:
    given = {"model": tiny.model(), "tokens_NL": tiny.tokens(), "pattern": 0.5, "allocation": "owl"} | given
    return barber.allocate(**given)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_model_that_can_be_pruned(kind: str) -> None:
    model, words = MODELS[kind]
    for call in (prune, allocate, lambda model: barber.perplexity(model, tiny.tokens())):
        with pytest.raises(UserError, match=f"^model must .*{words}"):
            call(model=model)


@pytest.mark.parametrize("kind", TOKENS)
def test_what_is_no_samples(kind: str) -> None:
    tokens, words = TOKENS[kind]
    for call in (prune, allocate):
        with pytest.raises(UserError, match=f"^tokens_NL must be .*{words}"):
            call(tokens_NL=tokens)


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_no_method_or_setting(kind: str) -> None:
    given, words = METHODS[kind]
    with pytest.raises(UserError, match=words):
        prune(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"allocation": barber.OWL}, r"^allocation must be .*; write OWL\(\)"),
        ({"allocation": "uniform"}, "^allocation='uniform': no such name; there is error, evopress, owl"),
        ({"pattern": "2:4"}, "^2:4 stays uniform"),
        ({"pattern": Exactly(3)}, "^pattern must be the sparsity of all linears together"),
    ],
)
def test_what_is_no_allocation(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        allocate(**given)


def test_short_forms_are_the_long_ones() -> None:
    short, long = tiny.model(), tiny.model()
    prune(model=short, pattern="2:4", pruner="sparsegpt", rebuild=["barber", "least_squares"])
    steps = [barber.Barber(), barber.LeastSquares()]
    prune(model=long, pattern=NM(2, 4), pruner=barber.SparseGPT(), rebuild=steps)
    for name, tensor in long.state_dict().items():
        assert torch.equal(tensor, short.state_dict()[name]), name
    assert prune(pattern="4:8").sparsity == prune(pattern=dict.fromkeys(NAMES, 0.5)).sparsity == 0.5
    assert allocate(pattern=0.5) == allocate(pattern=Unstructured(0.5), allocation=barber.OWL())


def test_names_stand_for_what_they_do_on_the_command_line() -> None:
    def described(method: Any) -> tuple[type, str]:
        return type(method), json.dumps(asdict(method))  # where lists and tuples are one

    for name in arguments.named("pruner"):
        assert described(built(f"pruner={name}").pruner) == described(arguments.pruner_from(name))
    for name in arguments.named("allocation"):
        chosen = built(f"allocation={name}", "pruner=wanda").allocation
        assert described(chosen) == described(arguments.allocation_from(name))
    for group in ("rebuild", "update"):
        for name in arguments.named(group):
            (chosen,) = getattr(built(f"{group}={name}"), group).values()
            assert described(chosen) == described(arguments.steps_from(name)["rebuild"])


def test_texts_become_samples_with_a_tokenizer() -> None:
    model = tiny.model(vocab_size=300)
    texts = ["It is a truth universally acknowledged", "that bytes are tokens, too." * 5]
    report = barber.prune(model, texts, tokenizer=tiny.tokenizer(), pattern=0.5, pruner="wanda")
    assert report.sparsity == 0.5
