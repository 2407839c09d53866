"""What a pass over the calibration set leaves behind is the same however the samples are batched."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from barber.methods.statistics import Hessian, MeanSquaredGradient, Moments, SecondMoment
from barber.model.observing import AllFed, observing_inputs, observing_outputs
from barber.runtime.distributed import Ranks
from barber.runtime.tensors import batches
from tests import oracles

NUM_SAMPLES, LENGTH, INPUTS, OUTPUTS = 8, 16, 32, 16
batch_sizes = pytest.mark.parametrize("batch_size", [1, 3, 8])


def inputs(seed: int = 0, channels: int = INPUTS) -> torch.Tensor:
    return torch.randn(NUM_SAMPLES, LENGTH, channels, generator=torch.Generator().manual_seed(seed))


def in_batches(x_NLI: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    for batch in batches(len(x_NLI), batch_size):
        yield x_NLI[batch]


class Gated(nn.Module):
    """Two linears fed the same tensor and one fed another, as in a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(INPUTS, OUTPUTS), nn.Linear(INPUTS, OUTPUTS)
        self.down = nn.Linear(OUTPUTS, INPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x).clamp_(-0.5, 0.5))  # in place, as OLMo does


def linears(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_children())


@batch_sizes
def test_the_second_moment_has_the_same_bits_for_any_batch_size(batch_size: int) -> None:
    x = inputs()
    statistic = SecondMoment(NUM_SAMPLES)
    for batch in in_batches(x, batch_size):
        statistic.add(batch.flatten(0, 1))
    per_sample = [[sum(column**2) for column in x_LI.T] for x_LI in x.double().numpy()]
    np.testing.assert_allclose(statistic.value().numpy(), np.mean(per_sample, axis=0), rtol=1e-6)
    whole = SecondMoment(NUM_SAMPLES)
    whole.add(x.flatten(0, 1))
    assert statistic.value().dtype == torch.float32
    assert torch.equal(statistic.value(), whole.value())


@batch_sizes
def test_the_moments_are_those_of_all_tokens(batch_size: int) -> None:
    x = inputs() + torch.arange(INPUTS)  # inputs that are far from zero for how much they vary, too
    statistic = Moments(NUM_SAMPLES)
    for batch in in_batches(x, batch_size):
        statistic.add(batch.flatten(0, 1))
    tokens_TI = x.double().flatten(0, 1).numpy()
    total_I, variance_I, squares_I = statistic.value().numpy()
    np.testing.assert_allclose(total_I, tokens_TI.sum(axis=0) / NUM_SAMPLES, rtol=1e-6)
    np.testing.assert_allclose(variance_I, tokens_TI.var(axis=0), rtol=1e-6)
    np.testing.assert_allclose(squares_I, (tokens_TI**2).sum(axis=0) / NUM_SAMPLES, rtol=1e-6)
    whole = Moments(NUM_SAMPLES)
    whole.add(x.flatten(0, 1))
    torch.testing.assert_close(statistic.value(), whole.value(), rtol=2e-7, atol=0)


def test_the_moments_of_processes_with_unequal_shares_are_those_of_one() -> None:
    x = inputs() + 1

    class Two(Ranks):
        def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + others.pop()

    others: list[torch.Tensor] = []
    mine, other, whole = Moments(NUM_SAMPLES), Moments(NUM_SAMPLES), Moments(NUM_SAMPLES)
    mine.add(x[:3].flatten(0, 1))
    other.add(x[3:].flatten(0, 1))
    whole.add(x.flatten(0, 1))

    class Listening(Ranks):
        def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
            others.append(tensor)
            return tensor

    other.value(Listening())
    torch.testing.assert_close(mine.value(Two()), whole.value(), rtol=2e-7, atol=0)


def test_an_input_that_never_changes_has_no_variance() -> None:
    statistic = Moments(2)
    for _ in range(3):
        statistic.add(torch.full((50, 4), 0.1))
    assert (statistic.value()[1] < 1e-15).all() and (statistic.value()[1] >= 0).all()


@batch_sizes
def test_the_hessian_is_twice_the_mean_outer_product(batch_size: int) -> None:
    x = inputs()
    statistic = Hessian(NUM_SAMPLES)
    for batch in in_batches(x, batch_size):
        statistic.add(batch.flatten(0, 1))
    per_sample = [sum(2 * np.outer(token, token) for token in x_LI) for x_LI in x.double().numpy()]
    np.testing.assert_allclose(statistic.value().numpy(), np.mean(per_sample, axis=0), rtol=1e-4, atol=1e-4)


def test_asking_a_statistic_for_its_value_does_not_use_it_up() -> None:
    """SparseGPT changes the Hessian that it is given."""
    for statistic in (SecondMoment(NUM_SAMPLES), Hessian(NUM_SAMPLES), Moments(NUM_SAMPLES)):
        statistic.add(inputs().flatten(0, 1))
        first = statistic.value().clone()
        statistic.value().zero_()
        assert torch.equal(statistic.value(), first)


@batch_sizes
def test_the_mean_squared_gradient_has_the_same_bits_for_any_batch_size(batch_size: int) -> None:
    x, gradient = inputs(0), inputs(1, OUTPUTS)
    statistic, whole = MeanSquaredGradient(NUM_SAMPLES), MeanSquaredGradient(NUM_SAMPLES)
    for batch, gradient_batch in zip(in_batches(x, batch_size), in_batches(gradient, batch_size), strict=True):
        statistic.add(batch, gradient_batch)
    whole.add(x, gradient)
    assert torch.equal(statistic.value(), whole.value())


def test_gradients_are_squared_sample_by_sample() -> None:
    """Two samples whose gradients cancel leave the mean of their squares, not the square of their mean."""
    x, gradient = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    gradient[1] = -1
    statistic = MeanSquaredGradient(2)
    statistic.add(x, gradient)
    assert torch.equal(statistic.value(), torch.full((5, 4), 9.0))


def test_linears_fed_the_same_tensor_share_one_statistic() -> None:
    module, x = Gated(), inputs()
    with observing_inputs(linears(module), lambda: SecondMoment(NUM_SAMPLES)) as statistics:
        for batch in in_batches(x, 3):
            module(batch)
    assert statistics["gate"] is statistics["up"]
    assert statistics["down"] is not statistics["gate"]
    expected = x.flatten(0, 1).double().square().sum(dim=0) / NUM_SAMPLES
    torch.testing.assert_close(statistics["up"].value(), expected.float())


def test_every_linear_gets_the_statistic_of_its_own_inputs() -> None:
    """Whatever is shared: a linear's statistic is what it would be if the linear were observed alone."""
    module, x = Gated(), inputs()
    with observing_inputs(linears(module), lambda: Hessian(NUM_SAMPLES)) as together:
        for batch in in_batches(x, 3):
            module(batch)
    for name, child in linears(module).items():
        with observing_inputs({name: child}, lambda: Hessian(NUM_SAMPLES)) as alone:
            for batch in in_batches(x, 3):
                module(batch)
        assert torch.equal(together[name].value(), alone[name].value())


def test_a_model_stopped_when_nothing_is_left_to_see_leaves_the_same_statistics() -> None:
    module, x, finished = Gated(), inputs(), []
    with observing_inputs(linears(module), lambda: Hessian(NUM_SAMPLES)) as expected:
        for batch in in_batches(x, 3):
            module(batch)
    module.down.register_forward_hook(lambda *_: finished.append(True))
    with observing_inputs(linears(module), lambda: Hessian(NUM_SAMPLES), stop=True) as statistics:
        for batch in in_batches(x, 3):
            with pytest.raises(AllFed):
                module(batch)
    assert statistics.keys() == expected.keys()
    for name, statistic in statistics.items():
        assert torch.equal(statistic.value(), expected[name].value())
    assert not finished
    module(x)
    assert finished


@batch_sizes
def test_observed_outputs_give_the_gradients_of_autograd(batch_size: int) -> None:
    module, x, target = Gated(), inputs(), inputs(1)
    squared = {name: MeanSquaredGradient(NUM_SAMPLES) for name in linears(module)}
    for batch, target_batch in zip(in_batches(x, batch_size), in_batches(target, batch_size), strict=True):
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        with observing_outputs(linears(module)) as observed:
            loss_B = (module(batch) - target_batch).square().mean(dim=(1, 2))
        gradients = torch.autograd.grad(loss_B.sum(), [one.edge for one in observed.values()])
        for (name, one), gradient in zip(observed.items(), gradients, strict=True):
            squared[name].add(one.x, gradient)

    def loss(pair: torch.Tensor) -> torch.Tensor:
        return (module(pair[0]) - pair[1]).square().mean()

    weights = {name: child.weight.requires_grad_() for name, child in linears(module).items()}
    expected, _ = oracles.mean_squared_gradient(loss, weights, torch.stack([x, target], dim=1))
    for name, statistic in squared.items():
        np.testing.assert_allclose(statistic.value().numpy(), expected[name], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "observing", [lambda modules: observing_inputs(modules, lambda: Hessian(1)), observing_outputs]
)
def test_nothing_is_observed_once_the_context_is_left(
    observing: Callable[[dict[str, nn.Module]], AbstractContextManager[dict[str, Any]]],
) -> None:
    """Not even if it was left by an error."""
    module = Gated()
    observed: list[dict[str, Any]] = []

    def failing() -> None:
        with observing(linears(module)) as seen:
            module(inputs())
            observed.append(seen)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert set(observed[0]) == {"gate", "up", "down"}
    observed[0].clear()
    module(inputs())
    assert not observed[0]
