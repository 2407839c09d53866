"""Layers are carried to the device and back beside the work: in order, in their dtypes, and with their errors."""

import threading
import time

import pytest
import torch

from barber import NM, Barber, NumericsError, SparseGPT, Wanda
from barber.methods.pruners import Pruner
from barber.model.weights import InMemory
from barber.runtime.offload import Offload
from barber.walk.walk import Schedule
from tests import tiny
from tests.pruning import assert_the_same, prune, walked

TIMEOUT = 30


class SlowOffload(Offload):
    """Leaves with the next load when it is told to."""

    def __init__(self) -> None:
        super().__init__(tiny.CPU)
        self.may_go = threading.Event()

    def _fetch(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        assert self.may_go.wait(TIMEOUT)
        return super()._fetch(tensors)

    def _store(self, *values: object) -> None:
        assert self.may_go.wait(TIMEOUT)
        super()._store(*values)  # type: ignore[arg-type]


class LateOffload(Offload):
    """Takes its time on the way home."""

    def __init__(self) -> None:
        super().__init__(tiny.CPU)

    def _store(self, *values: object) -> None:
        time.sleep(0.05)
        super()._store(*values)  # type: ignore[arg-type]


def test_what_was_ordered_is_taken_once_in_float32() -> None:
    offload = Offload(tiny.CPU)
    weight, index = torch.randn(3, 4, dtype=torch.bfloat16), torch.arange(5)
    offload.order(7, [weight, index])
    found_weight, found_index = offload.take(7, [weight, index])
    assert torch.equal(found_weight, weight.float()) and found_weight.dtype == torch.float32
    assert torch.equal(found_index, index) and found_index.dtype == torch.int64
    # It has been taken: the next one is brought anew.
    weight.zero_()
    assert not offload.take(7, [weight, index])[0].any()


def test_what_was_not_ordered_is_brought_now_as_a_copy() -> None:
    weight = torch.randn(3, 4)
    (found,) = Offload(tiny.CPU).take(1, [weight])
    assert torch.equal(found, weight)
    found.zero_()
    assert weight.all()


def test_an_order_does_not_wait_and_is_not_repeated() -> None:
    offload = SlowOffload()
    weight = torch.ones(3)
    offload.order(1, [weight])
    offload.order(1, [torch.zeros(3)])
    offload.may_go.set()
    assert torch.equal(offload.take(1, [torch.zeros(3)])[0], weight)


def test_several_orders_may_be_taken_in_any_order() -> None:
    offload = Offload(tiny.CPU)
    for key in range(4):
        offload.order(key, [torch.full((2,), float(key))])
    for key in (2, 0, 3, 1):
        assert offload.take(key, [])[0].tolist() == [key, key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_put_is_home_after_the_wait_in_the_dtype_of_home(dtype: torch.dtype) -> None:
    offload = SlowOffload()
    home, value = torch.zeros(3, 4, dtype=dtype), torch.randn(3, 4)
    storage = home.data_ptr()
    offload.put(home, value)
    assert not home.any()  # nobody has waited
    offload.may_go.set()
    offload.wait()
    assert torch.equal(home, value.to(dtype)) and home.data_ptr() == storage


def test_homes_that_are_transposed_or_belong_to_a_graph_are_filled() -> None:
    """GPT-2's weights are stored transposed; parameters want gradients."""
    offload, value = Offload(tiny.CPU), torch.randn(3, 4)
    transposed, parameter = torch.zeros(4, 3), torch.nn.Parameter(torch.zeros(3, 4))
    offload.put(transposed.T, value)
    offload.put(parameter.data, value)
    offload.wait()
    assert torch.equal(transposed.T, value) and torch.equal(parameter, value)


def test_the_last_of_two_values_stays_even_if_it_was_made_in_inference_mode() -> None:
    offload, home = Offload(tiny.CPU), torch.zeros(2)
    offload.put(home, torch.ones(2))
    with torch.inference_mode():
        offload.put(home, torch.full((2,), 2.0))
    offload.wait()
    assert home.tolist() == [2, 2]


def test_what_fails_on_the_way_is_told_by_take_and_not_again() -> None:
    offload = Offload(tiny.CPU)
    offload.order(1, [None])  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        offload.take(1, [])
    assert offload.take(1, [torch.ones(2)])[0].all()


def test_what_fails_on_the_way_home_is_told_by_wait_and_the_rest_is_home_then() -> None:
    offload, home = LateOffload(), torch.zeros(2)
    offload.put(torch.zeros(3), torch.ones(2))  # does not fit
    offload.put(home, torch.ones(2))
    with pytest.raises(RuntimeError):
        offload.wait()
    assert home.all()
    offload.wait()  # nothing is on the way any more


# ---------------------------------------------------------------------------------------------------------------------
# In the walk


class CarriedInMemory(InMemory):
    """As on a GPU."""

    def __init__(self, model: torch.nn.Module, offload: Offload) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self._offload = offload


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["paper", "interleaved"])
@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()], ids=lambda pruner: type(pruner).__name__)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_walk_with_offloading_leaves_the_same_bits(
    family: str, pruner: Pruner, schedule: Schedule, dtype: torch.dtype
) -> None:
    expected = walked(tiny.model(family).to(dtype), pruner=pruner, schedule=schedule)
    model = tiny.model(family).to(dtype)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    weights = CarriedInMemory(model, Offload(tiny.CPU))
    assert_the_same(walked(model, pruner=pruner, schedule=schedule, weights=weights), expected)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses


def test_the_next_layer_is_on_its_way_while_one_is_onloaded() -> None:
    ordered: list[int] = []

    class Noting(Offload):
        def order(self, key: int, tensors: object) -> None:
            if key not in self._fetched:
                ordered.append(key)
            super().order(key, tensors)  # type: ignore[arg-type]

    model = tiny.model("llama", num_hidden_layers=3)
    weights = CarriedInMemory(model, Noting(tiny.CPU))
    keys = [id(layer) for layer in weights._layers]
    for index in range(3):
        with weights.onloaded(index, tiny.CPU):
            assert ordered == keys[: index + 2]
    weights.finish()
    assert ordered == keys


@pytest.mark.parametrize("error", [NumericsError, KeyboardInterrupt])
def test_a_walk_that_ends_early_leaves_whole_layers(error: type[BaseException]) -> None:
    """What is finished is home, though it was on the way when the error came; what is not has its dense weights."""
    model = tiny.model("llama")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = CarriedInMemory(model, LateOffload())
    if error is NumericsError:
        dense["model.layers.1.self_attn.k_proj.weight"][0, 0] = -1
        model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan

    def interrupt(*_: object) -> None:
        if error is KeyboardInterrupt:
            raise error

    arguments = {"pattern": NM(2, 4), "pruner": Wanda(), "rebuild": Barber(), "weights": weights}
    with pytest.raises(error):
        prune(model, tiny.tokens(), on_block=interrupt, **arguments)
    for name, tensor in model.state_dict().items():
        if "layers.0" in name and tensor.ndim == 2:
            assert (tensor == 0).sum() == tensor.numel() // 2, name
        else:
            assert torch.equal(tensor.nan_to_num(-1), dense[name]), name


def test_a_layer_that_cannot_be_fetched_stops_the_walk() -> None:
    class Failing(Offload):
        def _fetch(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            raise MemoryError

    model = tiny.model("llama")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = CarriedInMemory(model, Failing(tiny.CPU))
    with pytest.raises(MemoryError):
        prune(model, tiny.tokens(), pattern=NM(2, 4), pruner=Wanda(), weights=weights)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
