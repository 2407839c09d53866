"""Squared gradients by the weights of dense decoder layers, one sample at a time: what some initial masks are made of.

They are of the whole model's loss, taken once before the walk with one layer at a time on the device, or of a layer's
own output, taken whenever the walk comes to it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from transformers import PreTrainedModel

from barber.methods.statistics import MeanSquaredGradient
from barber.model.blocks import Call, Layer
from barber.model.decoder import Decoder
from barber.model.driver import Driver, Turn, outside_of_layers
from barber.model.observing import observing_outputs
from barber.model.weights import Weights
from barber.runtime.activations import SETS, Activations, ActivationStore
from barber.runtime.distributed import Ranks
from barber.runtime.numerics import FiniteChecks
from barber.runtime.precision import Arithmetic
from barber.runtime.tensors import Tensor, batches, by_sample, in_float32, replaced_forward


def loss_gradients(
    model: PreTrainedModel,
    tokens_NL: Tensor,
    weights: Weights,
    device: torch.device,
    batch_size: int,
    store: ActivationStore | None = None,
    arithmetic: Arithmetic | None = None,
) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of every prunable weight, at the dense weights.

    The gradient is that of one sample's loss, the mean cross entropy of its tokens but the first. On the way up every
    layer's input is kept; on the way down each layer runs again, this time with a graph, and hands the gradient by its
    input on to the layer below.

    Time: each token costs about 8 operations a prunable weight, four times a forward pass: two of those, the backward
    pass by the activations, and the products of inputs and gradients. Memory: on the host the result, a float32 a
    prunable weight, in every process; in the store the inputs of all layers and the last one's output; on the device a
    layer in float32, as many numbers for its sums, and the graph of a batch. Without a layer there, the device has
    what lies outside of them in float32, and the logits of one sample.

    Args:
        model: in evaluation mode; it is left as it was.
        tokens_NL: token ids of all processes, which share the samples; at least two tokens a sample.
        weights: where the layers' weights are, as long as none of them is pruned.
        device: where the layers are computed.
        batch_size: samples that go through a layer together.
        store: where the inputs of the layers wait; None: wherever they have room.
        arithmetic: of the matrix products; None: float32.

    Returns:
        (O, I) float32 on the CPU by the linears' names, the same in all processes.

    Raises:
        NumericsError: NaN or infinite weights, activations, losses or gradients.
    """
    arithmetic = arithmetic or Arithmetic("float32", device)
    store = store or ActivationStore("auto", device, arithmetic.dtype)
    # Out of inference mode, which the caller may be in: no gradient can be had there.
    with torch.inference_mode(False), torch.no_grad(), weights.showing("dense"):
        driver = Driver(model, weights, device, arithmetic)
        ascent = _Ascent(Decoder(model), driver, batch_size, store, arithmetic, tokens_NL)
        ascent.go_up()
        ascent.take_losses()
        return ascent.go_down()


def add_norm_gradients(layer: Layer, call: Call, squared: Mapping[str, MeanSquaredGradient]) -> None:
    """Run a layer and take in the squared gradients of ||its output||_2, the norm over all that a sample gets.

    Matrix products are computed as the context has it that this is called in, which is not one of inference.

    Args:
        layer: with the weights that the gradients are taken at.
        call: its call for a batch of samples.
        squared: what they are added to, for every linear of the layer by its name.
    """

    def of_the_norms(y_BLD: Tensor) -> Tensor:
        norm_B11 = torch.linalg.vector_norm(y_BLD.float(), dim=(1, 2), keepdim=True)
        by_output_BLD: Tensor = y_BLD / norm_B11.clamp(min=torch.finfo(torch.float32).tiny)
        return by_output_BLD

    _differentiate(layer, call, squared, of_the_norms)


def _differentiate(
    layer: Layer, call: Call, squared: Mapping[str, MeanSquaredGradient], by_output: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Run a layer and take in the squared gradients of something that depends on its output.

    Args:
        by_output: the gradient of that by the layer's output, given the output; (B, L, D) both.

    Returns:
        The gradient by the layer's input, where the call's input asks for one: (B, L, D).
    """
    modules = {linear.name: linear.module for linear in layer.linears}
    with torch.enable_grad(), observing_outputs(modules) as observed:
        y_BLD = layer.run(call)
    wanted = [one.edge for one in observed.values() if one.edge]
    if call.x.requires_grad:
        wanted.append(get_gradient_edge(call.x))
    gradients = torch.autograd.grad(y_BLD, wanted, grad_outputs=by_output(y_BLD.detach()).to(y_BLD.dtype))
    num_samples = len(call.x)
    for (name, one), gradient in zip(observed.items(), gradients, strict=False):
        squared[name].add(by_sample(one.x.to(gradient.dtype), num_samples), by_sample(gradient, num_samples))
    return gradients[-1] if call.x.requires_grad else None


@dataclass
class _Ascent:
    """The samples' way up through the layers and the gradients' way down."""

    decoder: Decoder
    driver: Driver
    batch_size: int
    store: ActivationStore
    arithmetic: Arithmetic
    tokens_NL: Tensor

    def __post_init__(self) -> None:
        self._ranks = Ranks.present()
        self._checks = FiniteChecks(self._ranks)
        # A copy: what was made in inference mode can't take part in a graph.
        self._mine_NL = self.tokens_NL[self._ranks.share(len(self.tokens_NL))].clone()
        self._inputs = self.decoder.inputs(self._mine_NL, self.batch_size, self.store)
        first = self._inputs.hidden
        # The input of every layer and the output of the last one; on the way down the loss' gradients by them.
        self._states = [first, *_room(self.store, len(self.decoder.layers), first.shape)]

    def go_up(self) -> None:
        """Run the layers, and keep what each is given."""

        def look(turn: Turn) -> None:
            self._checks.order({f"{name}: the weight": weight_OI for name, weight_OI in turn.dense_OI.items()})
            for batch in self._batches():
                output_BLD = turn.layer.run(self._call(turn.index, batch))
                self._checks.order({f"{turn.layer.name}: its output": output_BLD})
                self._states[turn.index + 1][batch] = output_BLD
            self._checks.require()

        deque(self.driver.each(look), maxlen=0)

    def take_losses(self) -> None:
        """Put the gradients of the samples' losses in the place of what the last layer gave."""
        device = self.driver.device
        with in_float32(outside_of_layers(self.decoder.model), device), self.arithmetic():
            # One by one: the logits are by far the largest that there is.
            for sample in batches(len(self._mine_NL), 1):
                hidden_BLD = self._cast(self._states[-1][sample]).requires_grad_()
                tokens_BL = self._mine_NL[sample].to(device)
                with torch.enable_grad():
                    loss = self._loss(tokens_BL, hidden_BLD)
                    (gradient_BLD,) = torch.autograd.grad(loss, hidden_BLD)
                self._checks.order({"the loss": loss.detach(), "the gradient of the loss": gradient_BLD})
                self._states[-1][sample] = gradient_BLD
        self._checks.require()

    def go_down(self) -> dict[str, Tensor]:
        """Run the layers again, from the last to the first, and add up their squared gradients."""

        def look(turn: Turn) -> dict[str, Tensor]:
            squared = {linear.name: MeanSquaredGradient(len(self.tokens_NL)) for linear in turn.layer.linears}
            for batch in self._batches():
                self._states[turn.index][batch] = self._by_input(turn.index, batch, squared)
            found: dict[str, Tensor] = {}
            for name in list(squared):
                gradient_OI = squared.pop(name).value(self._ranks)
                self._checks.order({f"{name}: the gradient": gradient_OI})
                found[name] = gradient_OI.cpu()
            self._checks.require()
            return found

        found = {name: one for layer in self.driver.each(look, backwards=True) for name, one in layer.items()}
        return {linear.name: found[linear.name] for linear in self.decoder.linears}

    def _by_input(self, index: int, batch: slice, squared: Mapping[str, MeanSquaredGradient]) -> Tensor:
        """The gradient of a batch's losses by the input of a layer, whose squared gradients are taken in."""
        by_output_BLD, call = self._states[index + 1][batch], self._call(index, batch)
        call.x.requires_grad_()
        by_input_BLD = _differentiate(self.decoder.layers[index], call, squared, lambda _: by_output_BLD)
        assert by_input_BLD is not None
        return by_input_BLD

    def _batches(self) -> Iterator[slice]:
        return batches(len(self._mine_NL), self.batch_size)

    def _call(self, index: int, batch: slice) -> Call:
        return self._inputs.call(index, self._cast(self._states[index][batch]))

    def _cast(self, x_BLD: Tensor) -> Tensor:
        """What lay in the store, in float32 if that is what is computed in."""
        return x_BLD.float() if self.arithmetic.dtype == torch.float32 else x_BLD

    def _loss(self, tokens_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        """The loss of one sample, given the last layer's output; norm and head are left to the model's own forward."""
        with ExitStack() as stack:
            for layer in self.decoder.layers:
                stack.enter_context(replaced_forward(layer.module, lambda *_, **__: hidden_BLD))
            logits_BLV = self.decoder.model(input_ids=tokens_BL, use_cache=False).logits
        return nn.functional.cross_entropy(logits_BLV[0, :-1].float(), tokens_BL[0, 1:])


@dataclass
class _Part:
    """Some of the samples of activations, as activations of their own."""

    whole: Activations
    first: int
    shape: tuple[int, int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def __getitem__(self, samples: slice) -> Tensor:
        return self.whole[self._in_whole(samples)]

    def __setitem__(self, samples: slice, value_BLD: Tensor) -> None:
        self.whole[self._in_whole(samples)] = value_BLD

    def _in_whole(self, samples: slice) -> slice:
        start, stop, _ = samples.indices(self.shape[0])
        return slice(self.first + start, self.first + stop)


def _room(store: ActivationStore, count: int, shape: tuple[int, int, int]) -> list[Activations]:
    """Room for `count` times (N, L, D) numbers.

    The store chooses a place on which `SETS` of what it is asked for fit, so it is asked for as many: that is room for
    all of them.
    """
    num_samples, seqlen, width = shape
    a_set = -(-count // SETS)
    sets = [store.empty(min(a_set, count - i) * num_samples, seqlen, width) for i in range(0, count, a_set)]
    return [_Part(sets[i // a_set], i % a_set * num_samples, shape) for i in range(count)]
