"""Models whose weights are not their modules' own: refused before anything is changed, with what to do first."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from transformers import PreTrainedModel

import barber
from barber import Unstructured, UserError, Wanda
from tests import tiny


def adapted(model: PreTrainedModel, inside: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model  # seconds, which no other test is to wait for

    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    return model.add_adapter(adapter) if inside else get_peft_model(model, adapter)


def prompted(model: PreTrainedModel) -> Any:
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def of_a_class_of_ones_own(model: PreTrainedModel) -> PreTrainedModel:
    adapted(model, inside=True)
    for layer in model.model.layers:
        kind = type(layer.self_attn.q_proj)
        layer.self_attn.q_proj.__class__ = type("MyLinear", (kind,), {"__module__": "mine"})
    return model


def query(model: PreTrainedModel) -> nn.Linear:
    return model.model.layers[1].self_attn.q_proj


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    query(model).weight = nn.Parameter(query(model).weight.data.to(torch.int8), requires_grad=False)
    return model


def split(model: PreTrainedModel) -> PreTrainedModel:
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    return model


def with_quantiser(model: PreTrainedModel) -> PreTrainedModel:
    model.hf_quantizer = object()
    return model


def kept(change: Callable[[PreTrainedModel], object]) -> Callable[[PreTrainedModel], PreTrainedModel]:
    def changed(model: PreTrainedModel) -> PreTrainedModel:
        change(model)
        return model

    return changed


ODD: dict[str, tuple[Callable[[PreTrainedModel], PreTrainedModel], str]] = {
    "wrapped by peft": (adapted, "it is PeftModel of peft; merge"),
    "an adapter inside": (kept(lambda model: adapted(model, inside=True)), "q_proj is Linear of peft; merge"),
    "a learnt prompt": (prompted, "it is PeftModelForCausalLM of peft; merge"),
    "an adapter of a class of one's own": (of_a_class_of_ones_own, "q_proj is MyLinear of peft; merge"),
    "torch's pruning": (
        kept(lambda model: prune.l1_unstructured(query(model), "weight", amount=0.3)),
        "layers.1.self_attn.q_proj makes one .*torch.nn.utils.prune.remove",
    ),
    "a parametrisation": (
        kept(lambda model: parametrizations.orthogonal(query(model))),
        "layers.1.self_attn.q_proj makes one .*remove_parametrizations",
    ),
    "spectral norm": (kept(lambda model: spectral_norm(query(model))), "layers.1.self_attn.q_proj makes one "),
    "offloaded to the host": (kept(cpu_offload), "embed_tokens.weight is offloaded .* without device_map"),
    "in several places": (split, "it is offloaded or elsewhere; load it without device_map"),
    "quantised": (quantised, r"q_proj.weight is a Tensor of torch.int8; dequantise it first"),
    "quantised by transformers": (with_quantiser, "it is quantised; dequantise it first"),
}


@pytest.mark.parametrize("odd", ODD)
def test_weights_that_are_not_the_modules_own_are_refused(odd: str) -> None:
    change, words = ODD[odd]
    model = change(tiny.model())
    before = copy.deepcopy(model.state_dict())
    for call in (
        lambda: barber.prune(model, tiny.tokens(), pattern=Unstructured(0.5), pruner=Wanda()),
        lambda: barber.allocate(model, tiny.tokens(), pattern=Unstructured(0.5), allocation=barber.OWL()),
    ):
        with pytest.raises(UserError, match=f"^model must .*{words}"):
            call()
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, before[name]), name


def test_what_the_sentences_say_is_enough() -> None:
    merged = adapted(tiny.model()).merge_and_unload()
    removed = tiny.model()
    prune.l1_unstructured(query(removed), "weight", amount=0.3)
    prune.remove(query(removed), "weight")
    for model in (merged, removed):
        assert barber.prune(model, tiny.tokens(), pattern=Unstructured(0.5), pruner=Wanda()).sparsity == 0.5
        model(tiny.tokens())
        assert (query(model).weight == 0).float().mean() == 0.5
