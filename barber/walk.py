"""The walk: decoder layer by decoder layer, prune, then rebuild the mask block by block.

Two streams of activations advance together. The initial mask needs inputs that ran through *pruned* layers, the
rebuilding needs inputs that ran through *rebuilt* layers; both are brought one layer further before the next begins.
So the dense weights of one layer at a time are held beside the model, and a finished layer is never touched again.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from barber.blocks import Block, Call, Layer
from barber.decoder import Decoder, LayerInputs
from barber.errors import NumericsError
from barber.patterns import Pattern
from barber.pruners import Pruned, Pruner
from barber.rebuild import Barber
from barber.statistics import InputStatistic, MeanSquaredGradient, observing_inputs, observing_outputs
from barber.tensors import Tensor, batches


@dataclass(frozen=True)
class LinearResult:
    """What became of one linear: as the pruner left it, and as it is in the model now (float32)."""

    name: str
    initial: Pruned
    final: Pruned
    num_exchanged: int = 0


@dataclass(frozen=True)
class BlockResult:
    """What became of one block.

    Args:
        layer: index of the decoder layer.
        block: "attention" or "mlp".
        linears: one result a linear.
        seconds: time spent on the block; that of the layer's initial mask counts with its first block.
        loss_before: mean over samples of the squared error of the block's output with the initial mask, against the
            dense weights on the same inputs (None without rebuilding).
        loss_after: the same with the rebuilt mask.
    """

    layer: int
    block: str
    linears: list[LinearResult]
    seconds: float
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass
class Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class Stream:
    """The activations of all samples on their way through the layers."""

    inputs: LayerInputs
    hidden_NLD: Tensor
    batch_size: int

    def calls(self, layer: int) -> Iterator[tuple[slice, Call]]:
        """The layer's call for every batch of samples."""
        for batch in batches(len(self.hidden_NLD), self.batch_size):
            yield batch, self.inputs.call(layer, self.hidden_NLD[batch])

    def advance(self, index: int, layer: Layer) -> None:
        """Replace the layer's inputs by its outputs."""
        for batch, call in self.calls(index):
            self.hidden_NLD[batch] = layer.run(call)
        require_finite({f"{layer.name}: its output": self.hidden_NLD})


@dataclass
class LayerWork:
    """A layer in progress.

    Args:
        dense_OI: the linears' dense weights.
        initial: the linears as the pruner left them.
        done: the outputs of the blocks that are rebuilt already, batch by batch.
    """

    index: int
    layer: Layer
    dense_OI: dict[str, Tensor]
    initial: dict[str, Pruned] = field(default_factory=dict)
    done: list[list[Tensor]] = field(default_factory=list)


@dataclass
class Comparison:
    """A block run with dense and with initially pruned weights on the same inputs, batch by batch.

    Args:
        calls: the block's calls.
        targets: its outputs with dense weights.
        loss_N: every sample's loss of the initial masks.
        gradient_OI: mean over samples of the squared gradient of that loss at the dense weights.
    """

    calls: list[Call] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    loss_N: list[Tensor] = field(default_factory=list)
    gradient_OI: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Walk:
    """One pass over the decoder layers of a model, which is changed in place.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        tokens_NL: calibration token ids, int64.
        pattern: what the masks look like.
        pruner: the method of the initial masks.
        rebuild: the rebuilding of the masks, or None to leave the initial ones.
        device: where the layers are computed, one at a time and in float32.
        batch_size: samples that go through a layer together.
    """

    model: PreTrainedModel
    tokens_NL: Tensor
    pattern: Pattern
    pruner: Pruner
    rebuild: Barber | None
    device: torch.device
    batch_size: int
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def __iter__(self) -> Iterator[BlockResult]:
        """Prune and rebuild layer by layer; give the results of a layer's blocks when the layer is done.

        Raises:
            NumericsError: NaN or infinite weights, activations, losses or scores; the layer is left as it was.
        """
        decoder = Decoder(self.model)
        with self.stopwatch("embed"):
            inputs = decoder.inputs(self.tokens_NL, self.batch_size, self.device)
            pruned = rebuilt = Stream(inputs, inputs.hidden_NLD, self.batch_size)
            if self.rebuild is not None and self.pruner.statistic is not None:
                rebuilt = Stream(inputs, inputs.hidden_NLD.clone(), self.batch_size)
        for index, layer in enumerate(decoder.layers):
            # Out of inference mode, which the caller may be in: no gradient can be had there.
            with layer.at_work(self.device), torch.inference_mode(False), torch.no_grad():
                results = list(self._layer(index, layer, pruned, rebuilt))
            yield from results

    def _layer(self, index: int, layer: Layer, pruned: Stream, rebuilt: Stream) -> Iterator[BlockResult]:
        start = time.perf_counter()
        work = LayerWork(index, layer, {linear.name: linear.weight_OI for linear in layer.linears})
        require_finite({f"{name}: the weight": weight_OI for name, weight_OI in work.dense_OI.items()})
        self._prune(work, pruned)
        for block in layer.blocks:
            if self.rebuild is None:
                pairs = [(linear.name, work.initial[linear.name]) for linear in block.linears]
                linears = [LinearResult(name, initial, initial) for name, initial in pairs]
                yield BlockResult(index, block.name, linears, time.perf_counter() - start)
            else:
                linears, loss_before, loss_after = self._rebuild(work, block, self.rebuild, rebuilt)
                seconds = time.perf_counter() - start
                yield BlockResult(index, block.name, linears, seconds, loss_before, loss_after)
            start = time.perf_counter()
        if self.rebuild is not None:
            with self.stopwatch("propagate"):
                for (batch, call), *outputs in zip(rebuilt.calls(index), *work.done, strict=True):
                    rebuilt.hidden_NLD[batch] = layer.finish(call, outputs)
                require_finite({f"{layer.name}: its output": rebuilt.hidden_NLD})

    def _prune(self, work: LayerWork, stream: Stream) -> None:
        """Give every linear of the layer its initial mask, and bring the stream to the next layer."""
        linears = work.layer.linears
        statistics: dict[str, InputStatistic] = {}
        if self.pruner.statistic is not None:
            modules = {linear.name: linear.module for linear in linears}
            empty = partial(self.pruner.statistic, len(self.tokens_NL))
            with self.stopwatch("statistics"), observing_inputs(modules, empty) as statistics:
                for _, call in stream.calls(work.index):
                    work.layer.run(call)
        with self.stopwatch("initial mask"):
            last: InputStatistic | None = None
            prepared: Any = None
            for linear in linears:
                statistic = statistics.get(linear.name)
                try:
                    if statistic is not None and statistic is not last:
                        mean = statistic.value()
                        require_finite({"its input": mean})
                        last, prepared = statistic, self.pruner.prepare(mean)
                    work.initial[linear.name] = self.pruner.prune(linear.weight_OI, prepared, self.pattern)
                except NumericsError as error:
                    raise NumericsError(f"{linear.name}: {error}") from error
            require_finite({f"{name}: the pruned weight": pruned.weight_OI for name, pruned in work.initial.items()})
            for linear in linears:
                linear.assign(work.initial[linear.name].weight_OI)
        if self.pruner.statistic is not None:
            with self.stopwatch("propagate"):
                stream.advance(work.index, work.layer)

    def _rebuild(
        self, work: LayerWork, block: Block, rebuild: Barber, stream: Stream
    ) -> tuple[list[LinearResult], float, float]:
        """Rebuild the masks of the layer's next block.

        Returns the results of its linears and its loss with the initial and with the rebuilt masks.
        """
        with self.stopwatch("gradients"):
            compared = self._compare(work, block, stream, rebuild.metric.needs_gradient)
        with self.stopwatch("exchange"):
            results = self._exchange(work, block, rebuild, compared.gradient_OI)
        with self.stopwatch("propagate"):
            outputs = [block.run(call) for call in compared.calls]
            loss_after_N = [
                sample_losses(y, target, len(loss_B))
                for y, target, loss_B in zip(outputs, compared.targets, compared.loss_N, strict=True)
            ]
        loss_before, loss_after = torch.cat(compared.loss_N).mean(), torch.cat(loss_after_N).mean()
        require_finite({f"{work.layer.name}.{block.name}: the loss with the rebuilt mask": loss_after})
        work.done.append(outputs)
        return results, loss_before.item(), loss_after.item()

    def _compare(self, work: LayerWork, block: Block, stream: Stream, with_gradient: bool) -> Comparison:
        """Run the block sparse and dense on the same inputs, and take the gradients of the difference.

        The gradient is taken at the dense weights, for one sample's loss at a time (arXiv 2408.10631, section 3.3).
        """
        compared = Comparison()
        squared = {linear.name: MeanSquaredGradient() for linear in block.linears}
        modules = {linear.name: linear.module for linear in block.linears}
        for number, (_, call) in enumerate(stream.calls(work.index)):
            for linear in block.linears:
                linear.assign(work.initial[linear.name].weight_OI)
            before = [outputs[number] for outputs in work.done]
            block_call, y_sparse = work.layer.run_block(len(work.done), call, before)
            for linear in block.linears:
                linear.assign(work.dense_OI[linear.name])
            num_samples = len(call.x)
            with torch.set_grad_enabled(with_gradient), observing_outputs(modules) as observed:
                y_dense = block.run(block_call)
                loss_B = sample_losses(y_dense, y_sparse, num_samples)
            if with_gradient:
                outputs = [output for _, output in observed.values()]
                gradients = torch.autograd.grad(loss_B, outputs, grad_outputs=torch.ones_like(loss_B))
                for (name, (x, _)), gradient in zip(observed.items(), gradients, strict=True):
                    squared[name].add(by_sample(x, num_samples), by_sample(gradient, num_samples))
            compared.calls.append(block_call)
            compared.targets.append(y_dense.detach())
            compared.loss_N.append(loss_B.detach())
        if with_gradient:
            compared.gradient_OI = {name: statistic.value() for name, statistic in squared.items()}
        if not torch.cat(compared.loss_N).isfinite().all():
            if culprit := overflowing(block, compared.calls):
                raise NumericsError(f"{culprit}: its input or output is NaN or infinite")
            raise NumericsError(f"{work.layer.name}.{block.name}: the loss with the initial mask is NaN or infinite")
        require_finite({f"{name}: the gradient": gradient_OI for name, gradient_OI in compared.gradient_OI.items()})
        return compared

    def _exchange(
        self, work: LayerWork, block: Block, rebuild: Barber, gradient_OI: Mapping[str, Tensor]
    ) -> list[LinearResult]:
        """Rebuild the masks of the block's linears and let them use the weights that the new masks leave."""
        names = [linear.name for linear in block.linears]
        weight_OI = {name: rebuild.weight(work.dense_OI[name], work.initial[name]) for name in names}
        score_OI = {name: rebuild.metric.score(weight_OI[name], gradient_OI.get(name)) for name in names}
        require_finite({f"{name}: the score": score for name, score in score_OI.items()})
        rebuilt = rebuild.exchange(score_OI, {name: work.initial[name].mask_OI for name in names}, self.pattern)
        results = []
        for linear in block.linears:
            new = rebuilt[linear.name]
            final = Pruned.masking(weight_OI[linear.name], new.mask_OI)
            linear.assign(final.weight_OI)
            results.append(LinearResult(linear.name, work.initial[linear.name], final, new.num_exchanged))
        return results


def overflowing(block: Block, calls: list[Call]) -> str | None:
    """The first linear of a block whose input or output is NaN or infinite, with the weights it has now."""
    names = {linear.name: linear.module for linear in block.linears}
    for call in calls:
        with observing_outputs(names) as observed:
            block.run(call)
        for name, tensors in observed.items():
            if not all(tensor.isfinite().all() for tensor in tensors):
                return name
    return None


def sample_losses(y: Tensor, target: Tensor, num_samples: int) -> Tensor:
    """Mean over tokens and channels of the squared difference: (B,). Tokens may be flattened into samples."""
    return (y - target).square().reshape(num_samples, -1).mean(dim=1)


def by_sample(x: Tensor, num_samples: int) -> Tensor:
    """(B, L, channels) from that or from (B * L, channels)."""
    return x.reshape(num_samples, -1, x.shape[-1])


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Stop at the first tensor that holds NaN or infinity; `tensors` are named as the message should begin.

    Raises:
        NumericsError: naming the tensor.
    """
    # One transfer for all of them: on a GPU each would wait for the device.
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist() if tensors else []
    for name, fine in zip(tensors, finite, strict=True):
        if not fine:
            raise NumericsError(f"{name} is NaN or infinite")
