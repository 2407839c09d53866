"""Passes of the samples through a block: what the steps of a rebuilding look at comes from here.

Two streams of activations matter to a block. On the *rebuilt* one it is run with sparse and with dense weights on the
same inputs; the difference of the outputs is the block's error. The *dense* one, kept only where a step asks for it,
has what the dense model would feed the block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from barber.methods.pruners import Pruned
from barber.methods.statistics import (
    AllFed,
    CrossMoment,
    InputStatistic,
    MeanSquaredGradient,
    capturing_input,
    observing_outputs,
)
from barber.model.blocks import Block, Call, Layer, Linear
from barber.model.decoder import LayerInputs
from barber.runtime.activations import Activations
from barber.runtime.distributed import Ranks
from barber.runtime.numerics import FiniteChecks
from barber.runtime.precision import Arithmetic
from barber.runtime.tensors import Tensor, batches, by_sample, converted
from barber.runtime.timing import Stopwatch

INITIAL_LOSS = "the loss with the initial mask"

Observed = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Stream:
    """The activations of this process's samples on their way through the layers.

    Args:
        outputs: room for the outputs of a layer's blocks, as far as they are known.
    """

    inputs: LayerInputs
    hidden: Activations
    batch_size: int
    outputs: list[Activations] = field(default_factory=list)

    def calls(self, layer: int, samples: slice | None = None) -> Iterator[tuple[slice, Call]]:
        """The layer's call for every batch of samples, of all or of some; those are run one by one."""
        if samples is None:
            parts = batches(self.hidden.shape[0], self.batch_size)
        else:
            parts = (slice(number, number + 1) for number in range(samples.start, samples.stop))
        for batch in parts:
            yield batch, self.inputs.call(layer, self.hidden[batch])

    def done(self, blocks: int, batch: slice) -> list[Tensor]:
        """The outputs of the layer's first blocks."""
        return [outputs[batch] for outputs in self.outputs[:blocks]]

    def residual(self, blocks: int, batch: slice) -> Tensor:
        """The residual stream after the layer's first blocks, if it adds their outputs as they are."""
        hidden_BLD = self.hidden[batch]
        for output_BLD in self.done(blocks, batch):
            hidden_BLD = hidden_BLD + output_BLD
        return hidden_BLD


@dataclass
class LayerWork:
    """A layer in progress.

    Args:
        targets: room for the dense outputs of the block at work.
        dense_OI: the linears' dense weights.
        initial: the linears as the pruner left them.
        current: the linears as they are now.
        rebuilt: how many blocks are done: their outputs are in the stream, and those of the one at work with the
            initial masks.
        adds_outputs: the layer adds its blocks' outputs to the residual stream as they are.
    """

    index: int
    layer: Layer
    targets: Activations | None
    dense_OI: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Pruned] = field(default_factory=dict)
    current: dict[str, Pruned] = field(default_factory=dict)
    rebuilt: int = 0
    adds_outputs: bool = False


@dataclass
class Comparison:
    """What running a block with dense and with pruned weights on the same inputs has given.

    Args:
        stages: the linears that share an input, in the order in which they run.
        last: the linear whose output is the block's.
        loss_N: every sample's loss, batch by batch.
        gradient_OI: mean over samples of the squared gradient of every linear, where it was asked for.
    """

    squared: dict[str, MeanSquaredGradient]
    stages: list[list[str]] = field(default_factory=list)
    last: str | None = None
    loss_N: list[Tensor] = field(default_factory=list)
    gradient_OI: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Passes:
    """Runs the samples of this process through blocks.

    Args:
        forward, gradient: how products of plain and of differentiated passes are computed.
        num_samples: of all processes.
        keep_graphs: for `prune_and_compare`, keep the dense passes of all samples until the mask is known.
    """

    device: torch.device
    forward: Arithmetic
    gradient: Arithmetic
    checks: FiniteChecks
    stopwatch: Stopwatch
    ranks: Ranks
    num_samples: int
    keep_graphs: bool

    def assign(self, linears: Sequence[Linear], weight_OI: Mapping[str, Tensor], arithmetic: Arithmetic) -> None:
        """Let linears use these weights in the next pass."""
        for linear in linears:
            linear.assign(weight_OI[linear.name], arithmetic.dtype)

    def compare(self, work: LayerWork, block: Block, stream: Stream, with_gradient: bool) -> Comparison:
        """Run the block sparse and dense on the same inputs, and take the gradients of the difference if asked to.

        The gradient is taken at the dense weights, for one sample's loss at a time (arXiv 2408.10631, section 3.3).
        """
        compared = self._comparison(block)
        current_OI = {linear.name: work.current[linear.name].weight_OI for linear in block.linears}
        for batch, call in stream.calls(work.index):
            with self.stopwatch("compare"):
                self.assign(block.linears, current_OI, self.forward)
                with self.forward():
                    block_call, y_sparse = work.layer.run_block(work.rebuilt, call, stream.done(work.rebuilt, batch))
                self.assign(block.linears, work.dense_OI, self.gradient)
                with self._dense_pass(block, with_gradient) as observed:
                    y_dense = block.run(self.cast(block_call))
            self._take_in(compared, work, stream, batch, y_sparse, y_dense, observed, with_gradient)
        return self._compared(compared, work, block)

    def prune_and_compare(
        self,
        work: LayerWork,
        block: Block,
        stream: Stream,
        with_gradient: bool,
        observing: Callable[[], Any],
        select: Callable[[Mapping[str, InputStatistic]], None],
    ) -> Comparison:
        """The same for a block without an initial mask: the statistics for it come from the dense passes, too.

        Args:
            observing: a context that collects the pruner's statistics.
            select: gives the block its initial masks, given them.
        """
        compared = self._comparison(block)
        kept: list[tuple[Call, Tensor, Observed]] = []
        self.assign(block.linears, work.dense_OI, self.gradient)
        with observing() as statistics:
            for batch, call in stream.calls(work.index):
                with self.stopwatch("compare" if self.keep_graphs else "statistics"), suppress(AllFed):
                    keeps = with_gradient and self.keep_graphs
                    kept.append(self.run_dense(work, block, stream, batch, call, keeps))
        select(statistics)
        initial_OI = {linear.name: work.initial[linear.name].weight_OI for linear in block.linears}
        for batch, call in stream.calls(work.index):
            with self.stopwatch("compare"):
                if self.keep_graphs:
                    block_call, y_dense, observed = kept.pop(0)
                else:
                    self.assign(block.linears, work.dense_OI, self.gradient)
                    block_call, y_dense, observed = self.run_dense(work, block, stream, batch, call, with_gradient)
                self.assign(block.linears, initial_OI, self.forward)
                with self.forward():
                    y_sparse = block.run(block_call)
                # The backward pass reads the weights that the modules have when it runs.
                self.assign(block.linears, work.dense_OI, self.gradient)
            self._take_in(compared, work, stream, batch, y_sparse, y_dense, observed, with_gradient)
        return self._compared(compared, work, block)

    def look_at_inputs(
        self, work: LayerWork, block: Block, stage: Sequence[str], stream: Stream, statistic: InputStatistic
    ) -> Tensor:
        """The mean of a statistic of what linears that share their input are fed now."""
        first = _first(block, stage)
        with self.stopwatch("statistics"), self.forward():
            for batch, call in stream.calls(work.index):
                statistic.add(self._fed(work, first, stream, batch, call))
            return statistic.value(self.ranks)

    def look_at_both(
        self,
        work: LayerWork,
        block: Block,
        stage: Sequence[str],
        stream: Stream,
        dense: Stream,
        statistic: InputStatistic,
        writes: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """That, and how far away the dense model is: `drift` and `residual` of `barber.methods.rebuild.base.Evidence`.

        Args:
            writes: the linear's output is added to the residual stream.
        """
        first = _first(block, stage)
        current_OI = {linear.name: work.current[linear.name].weight_OI for linear in block.linears}
        drift, residual = CrossMoment(self.num_samples), CrossMoment(self.num_samples)
        with self.stopwatch("statistics"), self.forward():
            calls = zip(stream.calls(work.index), dense.calls(work.index), strict=True)
            for (batch, call), (_, dense_call) in calls:
                x_TI = self._fed(work, first, stream, batch, call)
                statistic.add(x_TI)
                self.assign(block.linears, work.dense_OI, self.forward)
                drift.add(self._fed(work, first, dense, batch, dense_call) - x_TI, x_TI)
                self.assign(block.linears, current_OI, self.forward)
                if writes:
                    lost_BLD = dense.residual(work.rebuilt, batch) - stream.residual(work.rebuilt, batch)
                    residual.add(lost_BLD.flatten(0, -2), x_TI)
            found = residual.value(self.ranks) if writes else None
            return statistic.value(self.ranks), drift.value(self.ranks), found

    def adds_outputs(self, work: LayerWork, stream: Stream) -> bool:
        """Whether the layer adds its blocks' outputs to the residual stream as they are, neither normed nor scaled.

        It is asked with outputs that are made up.
        """
        with self.forward():
            batch, call = next(stream.calls(work.index))
            hidden_BLD = stream.hidden[batch]
            done: list[Tensor] = []
            for index in range(len(work.layer.blocks)):  # so that they know how to answer
                done.append(work.layer.run_block(index, call, done)[1])
            outputs = [hidden_BLD * (number + 1) for number in range(len(work.layer.blocks))]
            found_BLD = work.layer.finish(call, outputs)
        return torch.allclose(found_BLD.float(), (hidden_BLD + sum(outputs)).float(), rtol=0.02, atol=1e-6)

    def _fed(self, work: LayerWork, linear: nn.Module, stream: Stream, batch: slice, call: Call) -> Tensor:
        """What a linear of the block at work is fed: (T, I)."""
        with capturing_input(linear) as fed:
            work.layer.run_block(work.rebuilt, call, stream.done(work.rebuilt, batch))
        return fed[0]

    def run_dense(
        self, work: LayerWork, block: Block, stream: Stream, batch: slice, call: Call, with_gradient: bool
    ) -> tuple[Call, Tensor, Observed]:
        """Run the layer as far as the block, whose weights are dense: the block's call, its output, its linears."""
        with self._dense_pass(block, with_gradient) as observed:
            done = [self.cast(output) for output in stream.done(work.rebuilt, batch)]
            block_call, y_dense = work.layer.run_block(work.rebuilt, self.cast(call), done)
        return block_call, y_dense, observed

    def finish(self, work: LayerWork, block: Block, stream: Stream) -> list[Tensor]:
        """Run the block with the weights that it has now, keep its outputs, and return the samples' losses."""
        assert work.targets is not None
        loss_N = []
        with self.stopwatch("propagate"), self.forward():
            for batch, call in stream.calls(work.index):
                _, y = work.layer.run_block(work.rebuilt, call, stream.done(work.rebuilt, batch))
                loss_N.append(sample_losses(y, work.targets[batch], batch.stop - batch.start))
                stream.outputs[work.rebuilt][batch] = y
        return loss_N

    def finish_dense(self, work: LayerWork, block: Block, dense: Stream) -> None:
        """Run the block as the dense model does, and keep its outputs."""
        self.assign(block.linears, work.dense_OI, self.forward)
        with self.stopwatch("propagate"), self.forward():
            for batch, call in dense.calls(work.index):
                _, y = work.layer.run_block(work.rebuilt, call, dense.done(work.rebuilt, batch))
                dense.outputs[work.rebuilt][batch] = y
        current_OI = {linear.name: work.current[linear.name].weight_OI for linear in block.linears}
        self.assign(block.linears, current_OI, self.forward)

    def propagate(self, work: LayerWork, stream: Stream) -> None:
        """Bring a stream to the next layer, given the outputs of all blocks."""
        with self.stopwatch("propagate"), self.forward():
            for batch, call in stream.calls(work.index):
                hidden_BLD = work.layer.finish(call, stream.done(len(work.layer.blocks), batch))
                self.checks.order({f"{work.layer.name}: its output": hidden_BLD})
                stream.hidden[batch] = hidden_BLD

    def overflowing(self, work: LayerWork, block: Block, stream: Stream) -> str | None:
        """The first linear of a block, in words, whose input or output is NaN or infinite with the dense weights."""
        self.assign(block.linears, work.dense_OI, self.gradient)
        work.rebuilt = work.layer.blocks.index(block)
        for batch, call in stream.calls(work.index):
            _, _, observed = self.run_dense(work, block, stream, batch, call, with_gradient=False)
            for name, tensors in observed.items():
                for tensor in tensors:
                    self.checks.order({f"{name}: its input or output": tensor})
        return self.checks.first_failed()

    def mean(self, loss_N: list[Tensor]) -> Tensor:
        """The mean over all samples of all processes: (), float64."""
        return self.ranks.all_reduce_sum(torch.cat(loss_N).double().sum()) / self.num_samples

    @contextmanager
    def _dense_pass(self, block: Block, with_gradient: bool) -> Iterator[Observed]:
        modules = {linear.name: linear.module for linear in block.linears}
        with torch.set_grad_enabled(with_gradient), self.gradient(), observing_outputs(modules) as observed:
            yield observed

    def cast(self, value: Any) -> Any:
        """A call or a tensor in the precision of gradients, if that is higher than that of forward passes."""
        if self.gradient.dtype == self.forward.dtype or self.gradient.dtype != torch.float32:
            return value
        if isinstance(value, Call):
            return Call(*(converted(part, self.device) for part in (value.x, value.args, value.kwargs)))
        return converted(value, self.device)

    def _take_in(
        self,
        compared: Comparison,
        work: LayerWork,
        stream: Stream,
        batch: slice,
        y_sparse: Tensor,
        y_dense: Tensor,
        observed: Observed,
        with_gradient: bool,
    ) -> None:
        """Add a batch to a comparison, and put its outputs down."""
        num_samples = batch.stop - batch.start
        with self.stopwatch("compare"), torch.set_grad_enabled(with_gradient):
            loss_B = sample_losses(y_dense, y_sparse, num_samples)
            gradients: Sequence[Tensor] = ()
            if with_gradient:
                outputs = [output for _, output in observed.values()]
                with self.gradient():
                    gradients = torch.autograd.grad(loss_B, outputs, grad_outputs=torch.ones_like(loss_B))
        with self.stopwatch("squared gradients"), self.gradient():
            for (name, (x, _)), gradient in zip(observed.items(), gradients, strict=with_gradient):
                x_BLI = by_sample(x.to(gradient.dtype), num_samples)
                compared.squared[name].add(x_BLI, by_sample(gradient, num_samples))
        if not compared.stages:
            compared.stages = _stages(observed)
            ends = (name for name, (_, y) in observed.items() if y.data_ptr() == y_dense.data_ptr())
            compared.last = next(ends, None)
        compared.loss_N.append(loss_B.detach())
        assert work.targets is not None
        work.targets[batch] = y_dense.detach()
        stream.outputs[work.rebuilt][batch] = y_sparse

    def _comparison(self, block: Block) -> Comparison:
        return Comparison({linear.name: MeanSquaredGradient(self.num_samples) for linear in block.linears})

    def _compared(self, compared: Comparison, work: LayerWork, block: Block) -> Comparison:
        """The comparison, with all batches in it."""
        self.checks.order({f"{work.layer.name}.{block.name}: {INITIAL_LOSS}": torch.cat(compared.loss_N)})
        with self.stopwatch("squared gradients"):
            for name, squared in compared.squared.items():
                if not squared.is_empty:
                    compared.gradient_OI[name] = squared.value(self.ranks)
        compared.squared.clear()
        self.checks.order({f"{name}: the gradient": gradient for name, gradient in compared.gradient_OI.items()})
        return compared


def _first(block: Block, stage: Sequence[str]) -> nn.Module:
    """The module of the first linear of a stage."""
    return next(linear.module for linear in block.linears if linear.name == stage[0])


def _stages(observed: Observed) -> list[list[str]]:
    """The linears that share an input, in the order in which they ran."""
    stages: dict[int, list[str]] = {}
    for name, (x, _) in observed.items():
        stages.setdefault(x.data_ptr(), []).append(name)
    return list(stages.values())


def sample_losses(y: Tensor, target: Tensor, num_samples: int) -> Tensor:
    """Mean over tokens and channels of the squared difference: (B,). Tokens may be flattened into samples."""
    difference_BLD = by_sample(y, num_samples).float() - by_sample(target, num_samples).float()
    return difference_BLD.square().mean(dim=(1, 2))
