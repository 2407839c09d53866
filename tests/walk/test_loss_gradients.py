"""Squared gradients of whole dense models and of their layers, against plain autograd one sample at a time."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from barber.errors import NumericsError
from barber.methods.statistics import MeanSquaredGradient
from barber.model.blocks import main_output
from barber.model.checkpoint import Checkpoint
from barber.model.decoder import Decoder
from barber.model.stream import Streamed, opened
from barber.model.weights import InMemory
from barber.runtime.activations import SETS, Activations, ActivationStore, Place
from barber.runtime.precision import Arithmetic
from barber.walk.loss_gradients import add_norm_gradients, loss_gradients
from tests import oracles, tiny
from tests.cli.running import save_model

CPU = torch.device("cpu")
NUM_SAMPLES = 5  # batches of 2, 2 and 1
every_family = pytest.mark.parametrize("name", tiny.DESCRIPTIONS)


def found(
    model: PreTrainedModel,
    store: ActivationStore | None = None,
    arithmetic: Arithmetic | None = None,
    batch_size: int = 2,
):
    return loss_gradients(model, tiny.tokens(NUM_SAMPLES), InMemory(model), CPU, batch_size, store, arithmetic)


def expected(model: PreTrainedModel, loss: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The oracle's squared gradients of a model, (O, I)."""
    linears = Decoder(model).linears
    squared, _ = oracles.mean_squared_gradient(
        loss, {linear.name: linear.module.weight for linear in linears}, tiny.tokens(NUM_SAMPLES)
    )
    return {linear.name: linear.turned(torch.from_numpy(squared[linear.name])) for linear in linears}


def expected_of_the_loss(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    exact = copy.deepcopy(model).double()
    return expected(exact, lambda tokens_L: exact(tokens_L[None], labels=tokens_L[None], use_cache=False).loss)


def assert_near(squared: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], share: float = 1e-4) -> None:
    """Every number is as it should be, but for a share of the largest of its linear."""
    assert list(squared) == list(exact)
    for name, gradient_OI in exact.items():
        assert squared[name].dtype == torch.float32
        assert gradient_OI.max() > 0
        torch.testing.assert_close(
            squared[name].double(), gradient_OI, rtol=0, atol=share * gradient_OI.max().item(), msg=name
        )


def assert_equal(squared: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert list(squared) == list(other)
    assert all(torch.equal(squared[name], gradient_OI) for name, gradient_OI in other.items())


# ---------------------------------------------------------------------------------------------------------------------
# Of the loss


@every_family
def test_gradients_of_the_loss_are_those_of_autograd_through_the_whole_model(name: str) -> None:
    model = tiny.model(name)
    assert_near(found(model), expected_of_the_loss(model))


@pytest.mark.parametrize(
    ("dtype", "share"),
    # The model's own rotations come in its dtype, as they do when it is run.
    [(torch.float32, 1e-4), (torch.bfloat16, 0.02)],
    ids=str,
)
def test_a_model_is_computed_in_float32_and_left_as_it_was(dtype: torch.dtype, share: float) -> None:
    model = tiny.model().to(dtype)
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    assert_near(found(model), expected_of_the_loss(model), share)
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert now.dtype == dtype and torch.equal(now, then), name
        assert now.requires_grad == then.requires_grad and now.grad is None, name
    assert [buffer.dtype for buffer in model.buffers()] == [buffer.dtype for buffer in before.buffers()]
    assert not any("forward" in vars(module) for module in model.modules())


def test_samples_may_go_through_the_layers_in_any_company() -> None:
    model = tiny.model()
    one_by_one, together = (found(model, batch_size=size) for size in (1, NUM_SAMPLES))
    for name, gradient_OI in together.items():
        torch.testing.assert_close(one_by_one[name], gradient_OI, rtol=1e-3, atol=1e-6 * gradient_OI.max().item())


@pytest.mark.parametrize("place", ["host", "disk", "auto"])
@pytest.mark.parametrize("layers", [2, 7])
def test_the_inputs_of_the_layers_may_wait_anywhere(place: Place, layers: int, tmp_path: Path) -> None:
    model = tiny.model(num_hidden_layers=layers)
    on_the_device = found(model, ActivationStore("device", CPU, torch.float32))
    assert_equal(found(model, ActivationStore(place, CPU, torch.float32, tmp_path)), on_the_device)


@pytest.mark.parametrize("layers", [2, 5, 7])
def test_the_store_reckons_with_the_inputs_of_all_layers(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for a place that has room for `SETS` of what it is asked for."""
    asked: list[int] = []
    empty = ActivationStore.empty

    def note(store: ActivationStore, num_samples: int, seqlen: int, width: int) -> Activations:
        asked.append(num_samples)
        return empty(store, num_samples, seqlen, width)

    monkeypatch.setattr(ActivationStore, "empty", note)
    found(tiny.model(num_hidden_layers=layers))
    embedded, *states = asked
    assert embedded == NUM_SAMPLES
    assert sum(states) == layers * NUM_SAMPLES <= SETS * states[0]


class Watched(InMemory):
    """Takes down which layers are on the device."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.order: list[int] = []
        self.present = 0

    @contextmanager
    def resident(self, index: int, device: torch.device) -> Iterator[None]:
        self.order.append(index)
        self.present += 1
        assert self.present == 1
        with super().resident(index, device):
            yield
        self.present -= 1


def test_one_layer_at_a_time_is_fetched_once_on_the_way_up_and_once_down() -> None:
    model = tiny.model(num_hidden_layers=3)
    weights = Watched(model)
    loss_gradients(model, tiny.tokens(NUM_SAMPLES), weights, CPU, batch_size=2)
    assert weights.order == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_that_stay_on_disk_have_the_same_gradients(name: str, tmp_path: Path) -> None:
    """The dense ones, even where a checkpoint has a pruned layer."""
    model = tiny.model(name)
    save_model(model, tmp_path / "model")
    hollow, tensors = opened(AutoConfig.from_pretrained(tmp_path / "model"), tmp_path / "model", None)
    checkpoint = Checkpoint(tmp_path, len(Decoder(hollow).layers))
    layer = Decoder(model).layers[0]
    pruned = {
        name: torch.zeros_like(tensor) for name, tensor in layer.module.state_dict(prefix=f"{layer.name}.").items()
    }
    checkpoint.write_layer(0, pruned, dense="")
    checkpoint.finish_layer(0, [], {}, {}, 2, NUM_SAMPLES)
    assert checkpoint.num_finished == 1
    squared = loss_gradients(hollow, tiny.tokens(NUM_SAMPLES), Streamed(hollow, tensors, checkpoint), CPU, 2)
    assert_equal(squared, found(model))
    assert all(tensor.is_meta for layer in Decoder(hollow).layers for tensor in layer.module.parameters())


def test_what_waited_in_bfloat16_is_computed_with_in_float32() -> None:
    model = tiny.model("gpt2")  # whose norms want one dtype
    squared = found(model, ActivationStore("device", CPU, torch.bfloat16))
    assert_near(squared, expected_of_the_loss(model), share=0.05)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_in_bfloat16_they_are_about_the_same(stored: torch.dtype) -> None:
    model = tiny.model()
    squared = found(model, ActivationStore("device", CPU, stored), Arithmetic("bfloat16", CPU))
    exact = found(model)
    assert not any(torch.equal(squared[name], gradient_OI) for name, gradient_OI in exact.items())
    assert_near(squared, {name: gradient_OI.double() for name, gradient_OI in exact.items()}, share=0.1)


def test_a_caller_in_inference_mode_gets_them_too() -> None:
    model = tiny.model()
    with torch.inference_mode():
        squared = found(model)
    assert_equal(squared, found(model))


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("model.embed_tokens.weight", "model.layers.0: its output"),
        ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.v_proj: the weight"),
        ("model.layers.1.post_attention_layernorm.weight", "model.layers.1: its output"),
        ("lm_head.weight", "the loss"),
    ],
)
def test_numbers_that_are_none_are_named_and_the_model_is_left_as_it_was(bad: str, message: str) -> None:
    model = tiny.model()
    model.get_parameter(bad).data[-1] = torch.inf
    tokens_NL = tiny.tokens(NUM_SAMPLES)
    tokens_NL[3, 2] = tiny.VOCABULARY - 1
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    with pytest.raises(NumericsError, match=f"^{message} is NaN or infinite$"):
        loss_gradients(model, tokens_NL, InMemory(model), CPU, batch_size=2)
    after = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    assert all(
        torch.equal(after[name][0], tensor) and after[name][1] == place for name, (tensor, place) in before.items()
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_gradient_that_overflows_is_named() -> None:
    """The loss and what is handed down are numbers that float32 has, their squares are not."""
    model = tiny.model()
    model.lm_head.weight.data *= 1e22
    with pytest.raises(NumericsError, match=r"^model\.layers\.1\.\w+\.\w+: the gradient is NaN or infinite$"):
        found(model)


# ---------------------------------------------------------------------------------------------------------------------
# Of the norm of a layer's output


def gradients_of_the_norm(model: PreTrainedModel, index: int, batch_size: int) -> dict[str, torch.Tensor]:
    """Through a layer of a dense model."""
    decoder, tokens_NL = Decoder(model), tiny.tokens(NUM_SAMPLES)
    layer = decoder.layers[index]
    squared = {linear.name: MeanSquaredGradient(NUM_SAMPLES) for linear in layer.linears}
    with torch.no_grad():
        store = ActivationStore("device", CPU, torch.float32)
        inputs = decoder.inputs(tokens_NL, batch_size, store)
        for start in range(0, NUM_SAMPLES, batch_size):
            hidden_BLD = inputs.hidden[slice(start, min(start + batch_size, NUM_SAMPLES))]
            for below in range(index):
                hidden_BLD = decoder.layers[below].run(inputs.call(below, hidden_BLD))
            with layer.onloaded(CPU):
                add_norm_gradients(layer, inputs.call(index, hidden_BLD), squared)
    return {name: gradient.value() for name, gradient in squared.items()}


@every_family
def test_gradients_of_the_norm_of_a_layers_output_are_those_of_autograd(name: str) -> None:
    model, index = tiny.model(name), 1
    exact = copy.deepcopy(model).double()
    seen: list[torch.Tensor] = []
    layer = Decoder(exact).layers[index]
    layer.module.register_forward_hook(lambda _, __, output: seen.append(main_output(output)))

    def norm(tokens_L: torch.Tensor) -> torch.Tensor:
        exact(tokens_L[None], use_cache=False)
        return seen.pop().norm()

    weights = {linear.name: linear.module.weight for linear in layer.linears}
    squared, _ = oracles.mean_squared_gradient(norm, weights, tiny.tokens(NUM_SAMPLES))
    turned = {linear.name: linear.turned(torch.from_numpy(squared[linear.name])) for linear in layer.linears}
    assert_near(gradients_of_the_norm(model, index, batch_size=2), turned)


def test_an_output_of_zeros_has_no_direction_and_no_gradient() -> None:
    model = tiny.model()
    model.model.embed_tokens.weight.data.zero_()
    squared = gradients_of_the_norm(model, 0, batch_size=2)
    assert len(squared) == 7 and not any(gradient_OI.any() for gradient_OI in squared.values())
