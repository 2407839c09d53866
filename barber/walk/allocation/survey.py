"""A pass over the dense model: each of its layers on what it is fed there, with the scores of its weights."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from barber.methods.statistics import SecondMoment
from barber.model.blocks import Call, Layer
from barber.model.decoder import Decoder, LayerInputs
from barber.model.driver import Turn
from barber.model.observing import observing_inputs
from barber.runtime.activations import Activations
from barber.runtime.numerics import FiniteChecks
from barber.runtime.tensors import Tensor, batches
from barber.walk.allocation.base import Setting


@dataclass(frozen=True)
class Surveyed:
    """A decoder layer at work, dense.

    Args:
        dense_OI: the weights of its linears, by name, float32.
        norm_I: Wanda's norms of their inputs.
        before: what the layer is fed, the samples of this process.
        after: what it gives.
    """

    index: int
    layer: Layer
    dense_OI: Mapping[str, Tensor]
    norm_I: Mapping[str, Tensor]
    inputs: LayerInputs
    before: Activations
    after: Activations
    batch_size: int

    def calls(self) -> Iterator[tuple[slice, Call]]:
        """The layer's call for every batch of samples."""
        for batch in batches(self.before.shape[0], self.batch_size):
            yield batch, self.inputs.call(self.index, self.before[batch])

    def score_OI(self, name: str) -> Tensor:
        """Wanda's scores of a linear."""
        return self.dense_OI[name].abs() * self.norm_I[name]


def survey(setting: Setting, look: Callable[[Surveyed], None]) -> None:
    """Take the samples through the dense model, layer by layer, and show each layer; it may be changed meanwhile.

    Raises:
        NumericsError: NaN or infinite activations.
    """
    decoder, checks = Decoder(setting.model), FiniteChecks(setting.ranks)
    num_samples = len(setting.tokens_NL)
    # Out of inference mode, as in the walk: what is kept of the model has to be of use there.
    with torch.inference_mode(False), torch.no_grad(), setting.weights.showing("dense"):
        tokens_NL = setting.tokens_NL[setting.ranks.share(num_samples)]
        inputs = decoder.inputs(tokens_NL, setting.batch_size, setting.store)
        before, after = inputs.hidden, setting.store.empty(*inputs.hidden.shape)

        def show(turn: Turn) -> None:
            nonlocal before, after
            index, layer = turn.index, turn.layer
            modules = {linear.name: linear.module for linear in layer.linears}
            with observing_inputs(modules, partial(SecondMoment, num_samples)) as statistics:
                for batch in batches(len(tokens_NL), setting.batch_size):
                    hidden_BLD = layer.run(inputs.call(index, before[batch]))
                    checks.order({f"{layer.name}: its output": hidden_BLD})
                    after[batch] = hidden_BLD
            means_I = {id(statistic): statistic.value(setting.ranks) for statistic in statistics.values()}
            mean_I = {name: means_I[id(statistic)] for name, statistic in statistics.items()}
            checks.order({f"{name}: its input": mean for name, mean in mean_I.items()})
            checks.require()
            norm_I = {name: mean.sqrt() for name, mean in mean_I.items()}
            look(Surveyed(index, layer, turn.dense_OI, norm_I, inputs, before, after, setting.batch_size))
            before, after = after, before

        deque(setting.driver.each(show), maxlen=0)
