"""The walk: decoder layer by decoder layer, prune, then rebuild the mask block by block.

Two streams of activations advance together. The initial mask needs inputs that ran through *pruned* layers, the
rebuilding needs inputs that ran through *rebuilt* layers; both are brought one layer further before the next begins.
So the dense weights of one layer at a time are held beside the model, and a finished layer is never touched again.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from barber.activations import Activations, Shelf
from barber.blocks import Block, Call, Layer, Linear
from barber.decoder import Decoder, LayerInputs
from barber.errors import NumericsError
from barber.initial import InitialMasks
from barber.memory import keep_freed_memory
from barber.numerics import FiniteChecks
from barber.patterns import Pattern
from barber.precision import Arithmetic, Precision
from barber.pruners import Pruned, Pruner
from barber.ranks import Ranks
from barber.rebuild import Evidence, Rebuild
from barber.statistics import AllFed, InputStatistic, MeanSquaredGradient, observing_inputs, observing_outputs
from barber.tensors import Tensor, batches, converted
from barber.timing import Stopwatch
from barber.weights import InMemory, Weights

Schedule = Literal["paper", "interleaved"]

_INITIAL_LOSS = "the loss with the initial mask"


@dataclass(frozen=True)
class LinearResult:
    """What became of one linear: as the pruner left it, and as it is in the model now (float32).

    Args:
        zeros: exact zeros of the weight as it is stored.
    """

    name: str
    initial: Pruned
    final: Pruned
    zeros: int
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
class Stream:
    """The activations of this process's samples on their way through the layers."""

    inputs: LayerInputs
    hidden: Activations
    batch_size: int

    def calls(self, layer: int) -> Iterator[tuple[slice, Call]]:
        """The layer's call for every batch of samples."""
        for batch in batches(self.hidden.shape[0], self.batch_size):
            yield batch, self.inputs.call(layer, self.hidden[batch])


@dataclass
class LayerWork:
    """A layer in progress.

    Args:
        outputs: room for the outputs of its blocks; those of the first `rebuilt` blocks are there, with the rebuilt
            masks, and those of the one at work with the initial masks.
        targets: room for the dense outputs of the block at work.
        dense_OI: the linears' dense weights.
        initial: the linears as the pruner left them.
        final: the weights that they are left with.
    """

    index: int
    layer: Layer
    outputs: list[Activations]
    targets: Activations | None
    dense_OI: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Pruned] = field(default_factory=dict)
    final: dict[str, Tensor] = field(default_factory=dict)
    rebuilt: int = 0

    def done(self, batch: slice) -> list[Tensor]:
        """The outputs of the blocks that are rebuilt already."""
        return [outputs[batch] for outputs in self.outputs[: self.rebuilt]]


@dataclass
class Comparison:
    """What running a block with dense and with initially pruned weights on the same inputs has given.

    Args:
        squared: of every linear, the gradients of the samples' losses at the dense weights.
        inputs: the rebuilding's statistic of every linear's inputs, with the initial masks.
        loss_N: every sample's loss of the initial masks, batch by batch.
    """

    squared: dict[str, MeanSquaredGradient]
    inputs: dict[str, InputStatistic] = field(default_factory=dict)
    loss_N: list[Tensor] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)


@dataclass
class Exchanged:
    """The linears of a block with their rebuilt masks, and the pairs that each exchanged: (), int64."""

    final: dict[str, Pruned]
    num_exchanged: dict[str, Tensor]


@dataclass
class Walk:
    """One pass over the decoder layers of a model, which is changed in place.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        tokens_NL: calibration token ids, int64, of all processes.
        pattern: what the masks look like.
        pruner: the method of the initial masks.
        rebuild: the rebuilding of the masks, or None to leave the initial ones.
        device: where the layers are computed, one at a time.
        batch_size: samples that go through a layer together.
        weights: where the layers' weights come from and go to; None: they are the model's own.
        precision: of the matrix products.
        shelf: where activations wait; None: on the device.
        schedule: `paper`: the initial mask is computed on a stream of its own, through pruned layers. `interleaved`:
            on the inputs that the rebuilding has, block by block; the dense pass serves both then.
        keep_graphs: for `interleaved`, keep the dense passes of all samples until the mask is known, instead of
            running them again.
        initial: initial masks that are kept across runs: read where they are complete, otherwise written. Not for
            `interleaved`, whose initial masks depend on the rebuilding.
        begin: the layer to begin with, the ones before it being finished.
        restore: fills the streams, by name, where `begin` is not 0.
    """

    model: PreTrainedModel
    tokens_NL: Tensor
    pattern: Pattern
    pruner: Pruner
    rebuild: Rebuild | None
    device: torch.device
    batch_size: int
    weights: Weights | None = None
    precision: Precision = field(default_factory=Precision)
    shelf: Shelf | None = None
    schedule: Schedule = "paper"
    keep_graphs: bool = True
    initial: InitialMasks | None = None
    begin: int = 0
    restore: Callable[[dict[str, Activations]], None] | None = None
    streams: dict[str, Activations] = field(default_factory=dict, init=False)
    initial_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.ranks = Ranks.present()
        self.stopwatch = Stopwatch(self.device)
        self._forward, self._gradient = self.precision.on(self.device)
        self._checks = FiniteChecks(self.ranks)
        self._interleaves = self.schedule == "interleaved" and self.rebuild is not None
        assert self.initial is None or not self._interleaves
        self._knows_initial = self.initial is not None and self.initial.complete
        # The initial masks need inputs of their own where they are not known and may not have those of the rebuilding.
        self._two_streams = (
            self.rebuild is not None
            and self.pruner.statistic is not None
            and not (self._interleaves or self._knows_initial)
        )

    def __iter__(self) -> Iterator[BlockResult]:
        """Prune and rebuild layer by layer; give the results of a layer's blocks when the layer is done.

        Raises:
            NumericsError: NaN or infinite weights, activations, losses or scores; the layer is left as it was.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        decoder = Decoder(self.model)
        weights = self.weights or InMemory(self.model)
        tokens_NL = self.tokens_NL[self.ranks.share(len(self.tokens_NL))]
        shelf = self.shelf or Shelf("device", self.device, self._forward.dtype)
        # Out of inference mode, which the caller may be in: no gradient can be had there.
        with self.stopwatch("capture"), torch.inference_mode(False), torch.no_grad():
            inputs = decoder.inputs(tokens_NL, self.batch_size, shelf)
            pruned = rebuilt = Stream(inputs, inputs.hidden, self.batch_size)
            outputs: list[Activations] = []
            targets = None
            if self.rebuild is not None:
                targets = shelf.empty(*inputs.hidden.shape)
                outputs = [shelf.empty(*inputs.hidden.shape) for _ in decoder.layers[0].blocks]
                if self._two_streams:
                    rebuilt = Stream(inputs, shelf.empty(*inputs.hidden.shape), self.batch_size)
                    for batch in batches(len(tokens_NL), self.batch_size):
                        rebuilt.hidden[batch] = pruned.hidden[batch]
            self.streams = {"pruned": pruned.hidden, "rebuilt": rebuilt.hidden}
            if self.begin and self.restore is not None:
                self.restore(self.streams)
        try:
            for index, layer in enumerate(decoder.layers):
                if index < self.begin:
                    continue
                # Nothing holds on to the layer before: in float32, with both masks' weights, it is three layers more.
                work = LayerWork(index, layer, outputs, targets)
                stored = {linear.name: linear.module.weight.dtype for linear in layer.linears}
                with torch.inference_mode(False), torch.no_grad(), weights.at_work(index, self.device):
                    results = deque(self._layer(work, pruned, rebuilt, stored))
                while results:
                    yield results.popleft()
        finally:
            weights.finish()

    def _layer(
        self, work: LayerWork, pruned: Stream, rebuilt: Stream, stored: dict[str, torch.dtype]
    ) -> Iterator[BlockResult]:
        start = time.perf_counter()
        work.dense_OI = {linear.name: linear.weight_OI for linear in work.layer.linears}
        self._checks.order({f"{name}: the weight": weight_OI for name, weight_OI in work.dense_OI.items()})
        if self.initial is not None and self.initial.complete:
            with self.stopwatch("select"):
                work.initial = self.initial.read(work.index, work.dense_OI)
        elif self.pruner.statistic is None or not self._interleaves:
            self._prune_layer(work, pruned)
            self.initial_seconds += time.perf_counter() - start
            if self.initial is not None:
                self.initial.write(work.index, work.dense_OI, work.initial)
        for block in work.layer.blocks:
            if self.rebuild is None:
                exchanged = Exchanged({linear.name: work.initial[linear.name] for linear in block.linears}, {})
                losses: list[Tensor] = []
            else:
                exchanged, losses = self._rebuild(work, block, self.rebuild, rebuilt)
            yield self._look(work, block, rebuilt, exchanged, losses, stored, start)
            start = time.perf_counter()
        if self.rebuild is not None:
            with self.stopwatch("propagate"), self._forward():
                for batch, call in rebuilt.calls(work.index):
                    hidden_BLD = work.layer.finish(call, work.done(batch))
                    self._checks.order({f"{work.layer.name}: its output": hidden_BLD})
                    rebuilt.hidden[batch] = hidden_BLD
            self._checks.require()
        # As they are stored: not in the precision of the last pass.
        for linear in work.layer.linears:
            linear.assign(work.final.get(linear.name, work.initial[linear.name].weight_OI))

    def _look(
        self,
        work: LayerWork,
        block: Block,
        stream: Stream,
        exchanged: Exchanged,
        losses: list[Tensor],
        stored: dict[str, torch.dtype],
        start: float,
    ) -> BlockResult:
        """Wait for the device: the one time in a block that its figures and checks are looked at."""
        names = [linear.name for linear in block.linears]
        final = exchanged.final
        zeros = [(final[name].weight_OI.to(stored[name]) == 0).sum() for name in names]
        counts = [exchanged.num_exchanged[name] for name in names] if exchanged.num_exchanged else []
        figures = torch.stack([figure.double() for figure in [*losses, *zeros, *counts]]).tolist()
        if (failed := self._checks.first_failed()) is not None:
            culprit = self._overflowing(work, block, stream) if failed.endswith(_INITIAL_LOSS) else None
            raise NumericsError(f"{culprit or failed} is NaN or infinite")
        loss_before, loss_after = figures[:2] if losses else (None, None)
        figures = figures[len(losses) :]
        linears = [
            LinearResult(name, work.initial[name], final[name], int(figures[i]), int(figures[len(names) + i]))
            if counts
            else LinearResult(name, work.initial[name], final[name], int(figures[i]))
            for i, name in enumerate(names)
        ]
        return BlockResult(work.index, block.name, linears, time.perf_counter() - start, loss_before, loss_after)

    def _prune_layer(self, work: LayerWork, stream: Stream) -> None:
        """Give every linear of the layer its initial mask, and bring the stream to the next layer."""
        layer = work.layer
        statistics: dict[str, InputStatistic] = {}
        if self.pruner.statistic is not None:
            self._assign(layer.linears, work.dense_OI, self._forward)
            with self.stopwatch("statistics"), self._observing(layer.linears) as statistics, self._forward():
                for _, call in stream.calls(work.index):
                    with suppress(AllFed):
                        layer.run(call)
        self._select(work, layer.linears, statistics)
        is_last = work.index + 1 == len(stream.inputs.calls)
        if self.pruner.statistic is not None and not is_last:
            with self.stopwatch("propagate"), self._forward():
                for batch, call in stream.calls(work.index):
                    hidden_BLD = layer.run(call)
                    self._checks.order({f"{layer.name}: its output": hidden_BLD})
                    stream.hidden[batch] = hidden_BLD

    def _select(self, work: LayerWork, linears: list[Linear], statistics: Mapping[str, InputStatistic]) -> None:
        """Choose the initial masks of linears, given the statistics of their inputs."""
        with self.stopwatch("select"):
            last: InputStatistic | None = None
            prepared: Any = None
            for linear in linears:
                statistic = statistics.get(linear.name)
                try:
                    if statistic is not None and statistic is not last:
                        mean = statistic.value(self.ranks)
                        self._checks.order({f"{linear.name}: its input": mean})
                        last, prepared = statistic, self.pruner.prepare(mean)
                    weight_OI = work.dense_OI[linear.name]
                    work.initial[linear.name] = self.pruner.prune(weight_OI, prepared, self.pattern)
                except NumericsError as error:
                    self._checks.require()  # what it comes from, if anything
                    raise NumericsError(f"{linear.name}: {error}") from error
            pruned_OI = {linear.name: work.initial[linear.name].weight_OI for linear in linears}
            self._checks.order({f"{name}: the pruned weight": weight_OI for name, weight_OI in pruned_OI.items()})
            self._assign(linears, pruned_OI, self._forward)

    def _rebuild(
        self, work: LayerWork, block: Block, rebuild: Rebuild, stream: Stream
    ) -> tuple[Exchanged, list[Tensor]]:
        """Rebuild the masks of the layer's next block.

        Returns the linears with their new masks, and the block's losses with the initial and the rebuilt masks.
        """
        without_mask = self.pruner.statistic is not None and self._interleaves
        compare = self._prune_and_compare if without_mask else self._compare
        compared = compare(work, block, stream, rebuild)
        with self.stopwatch("exchange"):
            exchanged = self._exchange(work, block, rebuild, compared.evidence)
        loss_after_N = compared.loss_N
        if self._has_changed(work, block, exchanged):
            assert work.targets is not None
            loss_after_N = []
            with self.stopwatch("propagate"), self._forward():
                for batch, call in stream.calls(work.index):
                    _, y = work.layer.run_block(work.rebuilt, call, work.done(batch))
                    loss_after_N.append(sample_losses(y, work.targets[batch], batch.stop - batch.start))
                    work.outputs[work.rebuilt][batch] = y
        work.rebuilt += 1
        block_name = f"{work.layer.name}.{block.name}"
        losses = [self._mean(compared.loss_N), self._mean(loss_after_N)]
        self._checks.order({f"{block_name}: the loss with the rebuilt mask": losses[1]})
        return exchanged, losses

    def _has_changed(self, work: LayerWork, block: Block, exchanged: Exchanged) -> bool:
        """Whether the block's weights are others than those of the initial masks, whose outputs are there already.

        A small model exchanges nothing in most of its blocks where the ratio is small. A GPU is not asked.
        """
        names = [linear.name for linear in block.linears]
        same = (torch.equal(exchanged.final[name].weight_OI, work.initial[name].weight_OI) for name in names)
        return self.device.type != "cpu" or not all(same)

    def _compare(self, work: LayerWork, block: Block, stream: Stream, rebuild: Rebuild) -> Comparison:
        """Run the block sparse and dense on the same inputs, and take the gradients of the difference.

        The gradient is taken at the dense weights, for one sample's loss at a time (arXiv 2408.10631, section 3.3).
        """
        compared, with_gradient = self._comparison(block), rebuild.needs_gradient
        initial_OI = {linear.name: work.initial[linear.name].weight_OI for linear in block.linears}
        for batch, call in stream.calls(work.index):
            with self.stopwatch("compare"):
                self._assign(block.linears, initial_OI, self._forward)
                with self._forward(), self._feeding(rebuild, block, compared):
                    block_call, y_sparse = work.layer.run_block(work.rebuilt, call, work.done(batch))
                self._assign(block.linears, work.dense_OI, self._gradient)
                with self._dense_pass(block, with_gradient) as observed:
                    y_dense = block.run(self._suiting(block_call))
            self._take_in(compared, work, batch, y_sparse, y_dense, observed, with_gradient)
        return self._compared(compared, work, block)

    def _prune_and_compare(self, work: LayerWork, block: Block, stream: Stream, rebuild: Rebuild) -> Comparison:
        """The same for a block without an initial mask: the statistics for it come from the dense passes, too."""
        compared, with_gradient = self._comparison(block), rebuild.needs_gradient
        kept: list[tuple[Call, Tensor, dict[str, tuple[Tensor, Tensor]]]] = []
        self._assign(block.linears, work.dense_OI, self._gradient)
        with self._observing(block.linears, stop=not self.keep_graphs) as statistics:
            for batch, call in stream.calls(work.index):
                with self.stopwatch("compare" if self.keep_graphs else "statistics"), suppress(AllFed):
                    kept.append(self._run_dense(work, block, batch, call, with_gradient and self.keep_graphs))
        self._select(work, block.linears, statistics)
        initial_OI = {linear.name: work.initial[linear.name].weight_OI for linear in block.linears}
        for batch, call in stream.calls(work.index):
            with self.stopwatch("compare"):
                if self.keep_graphs:
                    block_call, y_dense, observed = kept.pop(0)
                else:
                    self._assign(block.linears, work.dense_OI, self._gradient)
                    block_call, y_dense, observed = self._run_dense(work, block, batch, call, with_gradient)
                self._assign(block.linears, initial_OI, self._forward)
                with self._forward(), self._feeding(rebuild, block, compared):
                    y_sparse = block.run(block_call)
                # The backward pass reads the weights that the modules have when it runs.
                self._assign(block.linears, work.dense_OI, self._gradient)
            self._take_in(compared, work, batch, y_sparse, y_dense, observed, with_gradient)
        return self._compared(compared, work, block)

    def _run_dense(
        self, work: LayerWork, block: Block, batch: slice, call: Call, with_gradient: bool
    ) -> tuple[Call, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Run the layer as far as the block, whose weights are dense: the block's call, its output, its linears."""
        with self._dense_pass(block, with_gradient) as observed:
            done = [self._suiting(output) for output in work.done(batch)]
            block_call, y_dense = work.layer.run_block(work.rebuilt, self._suiting(call), done)
        return block_call, y_dense, observed

    @contextmanager
    def _dense_pass(self, block: Block, with_gradient: bool) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        modules = {linear.name: linear.module for linear in block.linears}
        with torch.set_grad_enabled(with_gradient), self._gradient(), observing_outputs(modules) as observed:
            yield observed

    def _suiting(self, value: Any) -> Any:
        """A call or a tensor in the precision of gradients, if that is higher than that of forward passes."""
        if self._gradient.dtype == self._forward.dtype or self._gradient.dtype != torch.float32:
            return value
        if isinstance(value, Call):
            return Call(*(converted(part, self.device) for part in (value.x, value.args, value.kwargs)))
        return converted(value, self.device)

    def _take_in(
        self,
        compared: Comparison,
        work: LayerWork,
        batch: slice,
        y_sparse: Tensor,
        y_dense: Tensor,
        observed: Mapping[str, tuple[Tensor, Tensor]],
        with_gradient: bool,
    ) -> None:
        """Add a batch to a comparison, and put its outputs down."""
        num_samples = batch.stop - batch.start
        with self.stopwatch("compare"), torch.set_grad_enabled(with_gradient):
            loss_B = sample_losses(y_dense, y_sparse, num_samples)
            gradients: Sequence[Tensor] = ()
            if with_gradient:
                outputs = [output for _, output in observed.values()]
                with self._gradient():
                    gradients = torch.autograd.grad(loss_B, outputs, grad_outputs=torch.ones_like(loss_B))
        with self.stopwatch("squared gradients"), self._gradient():
            for (name, (x, _)), gradient in zip(observed.items(), gradients, strict=with_gradient):
                x_BLI = by_sample(x.to(gradient.dtype), num_samples)
                compared.squared[name].add(x_BLI, by_sample(gradient, num_samples))
        compared.loss_N.append(loss_B.detach())
        assert work.targets is not None
        work.targets[batch] = y_dense.detach()
        work.outputs[work.rebuilt][batch] = y_sparse

    def _comparison(self, block: Block) -> Comparison:
        return Comparison({linear.name: MeanSquaredGradient(len(self.tokens_NL)) for linear in block.linears})

    def _compared(self, compared: Comparison, work: LayerWork, block: Block) -> Comparison:
        """The comparison, with all batches in it."""
        block_name = f"{work.layer.name}.{block.name}"
        self._checks.order({f"{block_name}: {_INITIAL_LOSS}": torch.cat(compared.loss_N)})
        gradient_OI, inputs = {}, {}
        with self.stopwatch("squared gradients"):
            for name, squared in compared.squared.items():
                if not squared.is_empty:
                    gradient_OI[name] = squared.value(self.ranks)
        with self.stopwatch("statistics"):
            means = {id(statistic): statistic.value(self.ranks) for statistic in compared.inputs.values()}
            inputs = {name: means[id(statistic)] for name, statistic in compared.inputs.items()}
        self._checks.order({f"{name}: the gradient": gradient for name, gradient in gradient_OI.items()})
        compared.evidence = Evidence(gradient_OI, inputs)
        return compared

    def _feeding(self, rebuild: Rebuild, block: Block, compared: Comparison) -> AbstractContextManager[object]:
        """Collect what the rebuilding wants to know of the linears' inputs, if anything."""
        if rebuild.statistic is None:
            return nullcontext()
        modules = {linear.name: linear.module for linear in block.linears}
        return observing_inputs(modules, partial(rebuild.statistic, len(self.tokens_NL)), into=compared.inputs)

    def _exchange(self, work: LayerWork, block: Block, rebuild: Rebuild, evidence: Evidence) -> Exchanged:
        """Rebuild the masks of the block's linears and let them use the weights that the new masks leave."""
        names = [linear.name for linear in block.linears]
        weight_OI = {name: rebuild.weight(work.dense_OI[name], work.initial[name]) for name in names}
        mask_OI = {name: work.initial[name].mask_OI for name in names}
        rebuilt = rebuild.rebuild(weight_OI, mask_OI, evidence, self.pattern)
        self._checks.order({f"{name}: the score": found.score for name, found in rebuilt.items()})
        final = {name: Pruned.masking(weight_OI[name], rebuilt[name].mask_OI) for name in names}
        self._assign(block.linears, {name: pruned.weight_OI for name, pruned in final.items()}, self._forward)
        work.final.update({name: pruned.weight_OI for name, pruned in final.items()})
        return Exchanged(final, {name: rebuilt[name].num_exchanged for name in names})

    def _overflowing(self, work: LayerWork, block: Block, stream: Stream) -> str | None:
        """The first linear of a block, in words, whose input or output is NaN or infinite with the dense weights."""
        self._assign(block.linears, work.dense_OI, self._gradient)
        number = work.layer.blocks.index(block)
        work.rebuilt = number
        for batch, call in stream.calls(work.index):
            _, _, observed = self._run_dense(work, block, batch, call, with_gradient=False)
            for name, tensors in observed.items():
                for tensor in tensors:
                    self._checks.order({f"{name}: its input or output": tensor})
        return self._checks.first_failed()

    def _observing(self, linears: list[Linear], stop: bool = True) -> AbstractContextManager[dict[str, InputStatistic]]:
        """The statistic that the pruner needs of the linears' inputs; `stop` when nothing is left to see."""
        assert self.pruner.statistic is not None
        modules = {linear.name: linear.module for linear in linears}
        return observing_inputs(modules, partial(self.pruner.statistic, len(self.tokens_NL)), stop)

    def _mean(self, loss_N: list[Tensor]) -> Tensor:
        """The mean over all samples of all processes: (), float64."""
        return self.ranks.add_up(torch.cat(loss_N).double().sum()) / len(self.tokens_NL)

    @staticmethod
    def _assign(linears: list[Linear], weight_OI: Mapping[str, Tensor], arithmetic: Arithmetic) -> None:
        for linear in linears:
            linear.assign(weight_OI[linear.name], arithmetic.dtype)


def sample_losses(y: Tensor, target: Tensor, num_samples: int) -> Tensor:
    """Mean over tokens and channels of the squared difference: (B,). Tokens may be flattened into samples."""
    difference_BLD = by_sample(y, num_samples).float() - by_sample(target, num_samples).float()
    return difference_BLD.square().mean(dim=(1, 2))


def by_sample(x: Tensor, num_samples: int) -> Tensor:
    """(B, L, channels) from that or from (B * L, channels)."""
    return x.reshape(num_samples, -1, x.shape[-1])
