"""A model run over windows, as a whole and layer by layer: the same numbers, and every weight where it was before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from barber.evals.agreement import Agreement
from barber.evals.forward import Batch, BlockOutputs, Forward
from barber.evals.placement import goes_by_layer, placed
from barber.evals.windows import Windows
from barber.model.blocks import main_output
from barber.model.decoder import Decoder
from barber.runtime.tensors import moved
from tests import tiny

CPU = torch.device("cpu")
every_family = pytest.mark.parametrize("name", tiny.DESCRIPTIONS)
both = pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])

State = list[tuple[str, int, int]]


def run(
    model: PreTrainedModel, tokens_NL: torch.Tensor, by_layer: bool, outputs: BlockOutputs | None = None
) -> list[Batch]:
    """All batches of three windows."""
    with placed(model, CPU, by_layer), torch.no_grad():
        return list(Forward(model, CPU, 3, by_layer)(tokens_NL, outputs, lambda _: None))


def state(model: PreTrainedModel) -> State:
    """Which tensor every weight and buffer of a model is, and where in memory."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(tensor), tensor.data_ptr()) for name, tensor in tensors]


def replaced(model: PreTrainedModel) -> list[str]:
    """The modules that answer with another forward than their class's."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


class Elsewhere(TorchFunctionMode):
    """Plays the device: inside this context, what is moved from a model's memory is copied, even from CPU to CPU."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.home = {address for _, _, address in state(model)}
        self.fetched: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and result.data_ptr() in self.home:
            self.fetched.append(result.data_ptr())
            return result.clone()
        return result

    def away(self, module: nn.Module) -> bool:
        """Whether a module is on the device as a whole; one that is so in part is a mistake."""
        addresses = {tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
        assert addresses <= self.home or not addresses & self.home
        return not addresses & self.home


@contextmanager
def watched_layers(model: PreTrainedModel, elsewhere: Elsewhere) -> Iterator[list[list[int]]]:
    """Whenever a decoder layer computes something: which layers are on the device."""
    layers = [layer.module for layer in Decoder(model).layers]
    present: list[list[int]] = []

    def note(*_: Any) -> None:
        present.append([i for i, layer in enumerate(layers) if elsewhere.away(layer)])

    hooks = [layer.blocks[-1].modules[-1].register_forward_pre_hook(note) for layer in Decoder(model).layers]
    yield present
    for hook in hooks:
        hook.remove()


@every_family
def test_layer_by_layer_the_logits_are_those_of_the_model(name: str) -> None:
    model, tokens_NL = tiny.model(name), tiny.tokens(num_samples=5)  # batches of 3 and 2
    with torch.no_grad():
        logits_NLV = model(tokens_NL, use_cache=False).logits
    for by_layer in (False, True):
        found = run(model, tokens_NL, by_layer)
        assert [batch.windows for batch in found] == [slice(0, 3), slice(3, 5)]
        assert torch.equal(torch.cat([batch.tokens_BL for batch in found]), tokens_NL)
        torch.testing.assert_close(torch.cat([batch.logits_BLV for batch in found]), logits_NLV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_layer_by_layer_a_model_in_bfloat16_computes_in_bfloat16(name: str) -> None:
    model, tokens_NL = tiny.model(name).bfloat16(), tiny.tokens(num_samples=5)
    whole, by_layer = (run(model, tokens_NL, by_layer) for by_layer in (False, True))
    for one, other in zip(whole, by_layer, strict=True):
        assert other.hidden_BLD.dtype == torch.bfloat16
        assert torch.equal(other.hidden_BLD, one.hidden_BLD)
        assert torch.equal(other.logits_BLV, one.logits_BLV)


@every_family
def test_what_the_last_layer_gives_makes_the_models_logits(name: str) -> None:
    model, tokens_NL = tiny.model(name), tiny.tokens(num_samples=3)
    decoder, seen = Decoder(model), []
    hook = decoder.layers[-1].module.register_forward_hook(lambda _, __, output: seen.append(main_output(output)))
    with torch.no_grad():
        logits_NLV = model(tokens_NL, use_cache=False).logits
    hook.remove()
    for layer in decoder.layers:
        layer.module.register_forward_pre_hook(_refuse)
    assert torch.equal(decoder.logits(tokens_NL, seen[0]), logits_NLV)
    other_NLD = seen[0].flip(-1)
    assert not torch.allclose(decoder.logits(tokens_NL, other_NLD), logits_NLV)
    assert replaced(model) == []


def _refuse(module: nn.Module, args: Any) -> None:
    assert "forward" in vars(module), "a decoder layer runs again"


@both
@every_family
def test_block_outputs_are_those_of_the_full_model(name: str, by_layer: bool) -> None:
    model, tokens_NL = tiny.model(name), tiny.tokens(num_samples=5)
    expected: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for index, layer in enumerate(Decoder(model).layers):
        for block in layer.blocks:
            parts = expected.setdefault(f"{index}.{block.name}", [])
            take = lambda _, __, output, parts=parts: parts.append(main_output(output))  # noqa: E731
            hooks.append(block.modules[-1].register_forward_hook(take))
    with torch.no_grad():
        for window_L in tokens_NL:
            model(window_L[None], use_cache=False)
    for hook in hooks:
        hook.remove()

    positions = torch.tensor([0, 1, 15, 16, 40, 47, 48, 78, 79])  # of 80; the second batch begins with 48
    outputs = BlockOutputs(positions)
    run(model, tokens_NL, by_layer, outputs)
    assert outputs.joined().keys() == expected.keys()
    for key, y_PD in outputs.joined().items():
        assert y_PD.device == CPU
        expected_TD = torch.cat([part.flatten(0, -2) for part in expected[key]])
        torch.testing.assert_close(y_PD, expected_TD[positions], rtol=1e-5, atol=1e-6)


@both
def test_a_batch_without_a_position_adds_none(by_layer: bool) -> None:
    outputs = BlockOutputs(torch.tensor([2, 70]))
    run(tiny.model("llama"), tiny.tokens(num_samples=9, length=8), by_layer, outputs)  # 24 positions a batch
    assert all(len(y_PD) == 2 for y_PD in outputs.joined().values())


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (4, [0, 5, 10, 15]), (20, [*range(20)]), (99, [*range(20)])])
def test_positions_are_spread_evenly_over_all_windows(count: int, expected: list[int]) -> None:
    windows = Windows(torch.zeros(4, 5, dtype=torch.int64), 5, "ids", {})
    assert Agreement(count).outputs(windows).positions_P.tolist() == expected


@both
@every_family
def test_afterwards_every_weight_is_where_it_was(name: str, by_layer: bool) -> None:
    model = tiny.model(name)
    before, modules = state(model), replaced(model)
    with Elsewhere(model) as elsewhere:
        run(model, tiny.tokens(num_samples=5), by_layer)
    assert elsewhere.fetched
    assert state(model) == before
    assert replaced(model) == modules == []


def interrupted(model: PreTrainedModel, by_layer: bool, place: str) -> None:
    """An error while the model is placed: right away, in the midst of a layer, between batches, after a call."""
    tokens_NL = tiny.tokens(num_samples=5)
    with placed(model, CPU, by_layer), torch.no_grad():
        if place == "at once":
            raise KeyboardInterrupt
        if place == "in a layer":
            linear = Decoder(model).layers[1].linears[0].module
            hook = linear.register_forward_hook(_interrupt)
            try:
                list(Forward(model, CPU, 3, by_layer)(tokens_NL, None, lambda _: None))
            finally:
                hook.remove()
        if place == "after a call":
            model(tokens_NL)
            raise KeyboardInterrupt
        for _ in Forward(model, CPU, 3, by_layer)(tokens_NL, BlockOutputs(torch.arange(9)), lambda _: None):
            raise KeyboardInterrupt


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@both
@pytest.mark.parametrize("place", ["at once", "in a layer", "after a call", "between batches"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt/post-norm"])
def test_an_error_on_the_way_leaves_every_weight_where_it_was(name: str, place: str, by_layer: bool) -> None:
    model = tiny.model(name)
    before, hooks = state(model), [len(module._forward_hooks) for module in model.modules()]
    with Elsewhere(model), pytest.raises(KeyboardInterrupt):
        interrupted(model, by_layer, place)
    assert state(model) == before
    assert replaced(model) == []
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_module_is_moved_inside_the_context_only() -> None:
    model = tiny.model("llama")
    layer, other = (layer.module for layer in Decoder(model).layers)
    before = state(model)
    with Elsewhere(model) as elsewhere:
        with moved(list(layer.parameters()), CPU):
            assert elsewhere.away(layer)
            assert not elsewhere.away(other)
        assert state(model) == before
        with pytest.raises(KeyboardInterrupt), moved(list(layer.parameters()), CPU):
            _interrupt()
    assert state(model) == before


def test_an_interrupted_move_is_taken_back() -> None:
    """As when the device's memory does not suffice."""
    model = tiny.model("llama")
    before = state(model)

    class Full(Elsewhere):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.to and len(self.fetched) == 5:
                raise torch.OutOfMemoryError
            return super().__torch_function__(func, types, args, kwargs)

    for by_layer in (False, True):
        with pytest.raises(torch.OutOfMemoryError), Full(model):
            run(model, tiny.tokens(num_samples=5), by_layer)
        assert state(model) == before
        assert replaced(model) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_one_layer_at_a_time_is_on_the_device_and_each_comes_once_for_all_windows(name: str) -> None:
    model, tokens_NL = tiny.model(name), tiny.tokens(num_samples=5)
    with Elsewhere(model) as elsewhere, watched_layers(model, elsewhere) as present:
        run(model, tokens_NL, by_layer=True)
    num_layers = len(Decoder(model).layers)
    assert present == [[i] for i in range(num_layers) for _ in range(2)]
    assert sorted(elsewhere.fetched) == sorted(set(elsewhere.fetched))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_whoever_calls_a_model_placed_by_layer_has_one_layer_at_a_time_on_the_device(name: str) -> None:
    """As lm-eval and the sample do, which know nothing of it."""
    model, tokens_NL = tiny.model(name), tiny.tokens(num_samples=2)
    with torch.no_grad():
        expected = model(tokens_NL).logits
        generated = model.generate(tokens_NL, max_new_tokens=5, do_sample=False, pad_token_id=0)
        with Elsewhere(model) as elsewhere, placed(model, CPU, by_layer=True):
            assert not any(elsewhere.away(layer.module) for layer in Decoder(model).layers)
            assert elsewhere.away(model.get_input_embeddings())
            assert elsewhere.away(model.get_output_embeddings())
            with watched_layers(model, elsewhere) as present:
                torch.testing.assert_close(model(tokens_NL).logits, expected, rtol=1e-5, atol=1e-5)
            assert present == [[i] for i in range(len(Decoder(model).layers))]
            assert torch.equal(model.generate(tokens_NL, max_new_tokens=5, do_sample=False, pad_token_id=0), generated)


def test_a_whole_model_is_on_the_device_as_a_whole() -> None:
    model = tiny.model("llama")
    with Elsewhere(model) as elsewhere, watched_layers(model, elsewhere) as present:
        run(model, tiny.tokens(num_samples=5), by_layer=False)
    assert present == [[0, 1]] * 4
    assert sorted(elsewhere.fetched) == sorted(set(elsewhere.fetched))


@both
def test_tied_weights_stay_tied(by_layer: bool) -> None:
    model = tiny.model("llama", tie_word_embeddings=True)
    with Elsewhere(model) as elsewhere, placed(model, CPU, by_layer):
        assert elsewhere.away(model.lm_head)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("placement", "by_layer"), [("auto", False), ("whole", False), ("layers", True)])
def test_without_a_gpu_the_model_goes_as_a_whole_unless_told_otherwise(placement: Any, by_layer: bool) -> None:
    assert goes_by_layer(placement, tiny.model("llama"), CPU) is by_layer


@both
def test_a_step_of_the_progress_is_a_window(by_layer: bool) -> None:
    model, finished = tiny.model("llama"), []
    with placed(model, CPU, by_layer), torch.no_grad():
        forward = Forward(model, CPU, 2, by_layer)
        list(forward(tiny.tokens(num_samples=5), None, finished.append))
    assert sum(finished) == forward.steps(5)
    assert set(finished) == {1, 2}
