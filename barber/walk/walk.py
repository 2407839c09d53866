"""The walk: decoder layer by decoder layer, prune, then rebuild the mask block by block.

Two streams of activations advance together. The initial mask needs inputs that ran through *pruned* layers, the
rebuilding needs inputs that ran through *rebuilt* layers; both are brought one layer further before the next begins.
Steps of the rebuilding that follow the dense model have a third, which runs through dense layers.
So the dense weights of one layer at a time are held beside the model, and a finished layer is never touched again.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from barber.errors import NumericsError
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruned, Pruner
from barber.methods.rebuild import Evidence, Rebuild
from barber.methods.statistics import AllFed, InputStatistic, MeanSquaredGradient, observing_inputs
from barber.model.blocks import Block, Linear
from barber.model.decoder import Decoder
from barber.model.weights import InMemory, Weights
from barber.runtime.activations import Activations, Shelf
from barber.runtime.distributed import Ranks
from barber.runtime.memory import keep_freed_memory
from barber.runtime.numerics import FiniteChecks
from barber.runtime.precision import Precision
from barber.runtime.tensors import Tensor, batches
from barber.runtime.timing import Stopwatch
from barber.walk.initial import InitialMasks
from barber.walk.loss_gradients import add_norm_gradients
from barber.walk.passes import INITIAL_LOSS, LayerWork, Passes, Stream
from barber.walk.trial import BlockTrial

Schedule = Literal["paper", "interleaved"]


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
        steps: of the rebuilding, in order; none leave the initial masks.
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
        patterns: of linears, by name, that have another than the rest.
        gradients: mean over samples of the squared gradient of the language-model loss by every linear's weight, for
            pruners that ask for it.
    """

    model: PreTrainedModel
    tokens_NL: Tensor
    pattern: Pattern
    pruner: Pruner
    steps: Sequence[Rebuild]
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
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Activations] = field(default_factory=dict, init=False)
    initial_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.ranks = Ranks.present()
        self.stopwatch = Stopwatch(self.device)
        self._forward, self._gradient = self.precision.on(self.device)
        self._checks = FiniteChecks(self.ranks)
        self._interleaves = self.schedule == "interleaved" and bool(self.steps)
        assert self.initial is None or not self._interleaves
        self._knows_initial = self.initial is not None and self.initial.complete
        # The initial masks need inputs of their own where they are not known and may not have those of the rebuilding.
        self._two_streams = (
            bool(self.steps) and self.pruner.statistic is not None and not (self._interleaves or self._knows_initial)
        )
        self._passes = Passes(
            self.device,
            self._forward,
            self._gradient,
            self._checks,
            self.stopwatch,
            self.ranks,
            len(self.tokens_NL),
            self.keep_graphs,
        )
        self._dense: Stream | None = None

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
            tries = any(step.needs.trial for step in self.steps)
            inputs = decoder.inputs(tokens_NL, self.batch_size, shelf, also=(1,) if tries else ())
            hidden = inputs.hidden

            def room() -> list[Activations]:
                most_blocks = max(len(layer.blocks) for layer in decoder.layers)
                return [shelf.empty(*hidden.shape) for _ in range(most_blocks)]

            def copied() -> Stream:
                stream = Stream(inputs, shelf.empty(*hidden.shape), self.batch_size, room())
                for batch in batches(len(tokens_NL), self.batch_size):
                    stream.hidden[batch] = hidden[batch]
                return stream

            pruned = Stream(inputs, hidden, self.batch_size)
            rebuilt, targets = pruned, None
            if self.steps:
                targets = shelf.empty(*hidden.shape)
                rebuilt = copied() if self._two_streams else Stream(inputs, hidden, self.batch_size, room())
            self.streams = {"pruned": pruned.hidden, "rebuilt": rebuilt.hidden}
            if any(step.needs.dense for step in self.steps):
                self._dense = copied()
                self.streams["dense"] = self._dense.hidden
            if self.begin and self.restore is not None:
                self.restore(self.streams)
        try:
            for index, layer in enumerate(decoder.layers):
                if index < self.begin:
                    continue
                # Nothing holds on to the layer before: in float32, with both masks' weights, it is three layers more.
                work = LayerWork(index, layer, targets)
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
                work.current = dict(work.initial)
        elif self.pruner.statistic is None or not self._interleaves:
            self._prune_layer(work, pruned)
            self.initial_seconds += time.perf_counter() - start
            if self.initial is not None:
                self.initial.write(work.index, work.dense_OI, work.initial)
        if self._dense is not None:
            work.adds_outputs = self._passes.adds_outputs(work, self._dense)
        for block in work.layer.blocks:
            if not self.steps:
                exchanged = Exchanged({linear.name: work.initial[linear.name] for linear in block.linears}, {})
                losses: list[Tensor] = []
            else:
                exchanged, losses = self._rebuild(work, block, rebuilt)
            yield self._look(work, block, rebuilt, exchanged, losses, stored, start)
            start = time.perf_counter()
        if self.steps:
            self._passes.propagate(work, rebuilt)
            if self._dense is not None:
                self._passes.propagate(work, self._dense)
            self._checks.require()
        # As they are stored: not in the precision of the last pass.
        for linear in work.layer.linears:
            linear.assign(work.current[linear.name].weight_OI)

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
            culprit = self._passes.overflowing(work, block, stream) if failed.endswith(INITIAL_LOSS) else None
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
            self._passes.assign(layer.linears, work.dense_OI, self._forward)
            with self.stopwatch("statistics"), self._observing(layer.linears) as statistics, self._forward():
                for _, call in stream.calls(work.index):
                    with suppress(AllFed):
                        layer.run(call)
        self._select(work, layer.linears, statistics, self._norm_gradients(work, stream))
        is_last = work.index + 1 == len(stream.inputs.calls)
        if self.pruner.statistic is not None and not is_last:
            with self.stopwatch("propagate"), self._forward():
                for batch, call in stream.calls(work.index):
                    hidden_BLD = layer.run(call)
                    self._checks.order({f"{layer.name}: its output": hidden_BLD})
                    stream.hidden[batch] = hidden_BLD

    def _norm_gradients(self, work: LayerWork, stream: Stream) -> dict[str, Tensor]:
        """Squared gradients of the norm of the layer's output, where the pruner asks for them."""
        if self.pruner.gradient != "layer":
            return {}
        linears = work.layer.linears
        squared = {linear.name: MeanSquaredGradient(len(self.tokens_NL)) for linear in linears}
        self._passes.assign(linears, work.dense_OI, self._gradient)
        with self.stopwatch("squared gradients"), self._gradient():
            for _, call in stream.calls(work.index):
                add_norm_gradients(work.layer, call, squared)
        return {name: one.value(self.ranks) for name, one in squared.items()}

    def _select(
        self,
        work: LayerWork,
        linears: list[Linear],
        statistics: Mapping[str, InputStatistic],
        gradient_OI: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Choose the initial masks of linears, given the statistics of their inputs, and gradients of the layer."""
        known_OI = {**self.gradients, **(gradient_OI or {})}
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
                    pattern = self.patterns.get(linear.name, self.pattern)
                    known = known_OI.get(linear.name)
                    pruned = self.pruner.prune(
                        weight_OI, prepared, pattern, known.to(self.device) if known is not None else None
                    )
                    work.initial[linear.name] = work.current[linear.name] = pruned
                except NumericsError as error:
                    self._checks.require()  # what it comes from, if anything
                    raise NumericsError(f"{linear.name}: {error}") from error
            pruned_OI = {linear.name: work.initial[linear.name].weight_OI for linear in linears}
            self._checks.order({f"{name}: the pruned weight": weight_OI for name, weight_OI in pruned_OI.items()})
            self._passes.assign(linears, pruned_OI, self._forward)

    def _rebuild(self, work: LayerWork, block: Block, stream: Stream) -> tuple[Exchanged, list[Tensor]]:
        """Rebuild the masks of the layer's next block, step by step.

        Returns the linears with their new masks, and the block's losses with the initial and the rebuilt masks.
        """
        passes = self._passes
        steps = [step for step in self.steps for _ in range(step.needs.passes)]
        with_gradient = steps[0].needs.gradient
        if self.pruner.statistic is not None and self._interleaves:
            observing = partial(self._observing, block.linears, stop=not self.keep_graphs)
            select = partial(self._select, work, block.linears)
            compared = passes.prune_and_compare(work, block, stream, with_gradient, observing, select)
        else:
            compared = passes.compare(work, block, stream, with_gradient)
        if self._dense is not None:
            passes.finish_dense(work, block, self._dense)
        loss_before_N = compared.loss_N
        exchanged = Exchanged({linear.name: work.initial[linear.name] for linear in block.linears}, {})
        compared_anew = False
        for number, step in enumerate(steps):
            if step.needs.gradient and number > 0:
                compared = passes.compare(work, block, stream, with_gradient=True)
                compared_anew = True
            trial = BlockTrial(passes, work, block, stream, self._dense) if step.needs.trial else None
            if step.needs.statistic is None:
                evidence = Evidence(compared.gradient_OI, trial=trial)
                self._take(step, work, block, list(exchanged.final), evidence, exchanged)
                continue
            for stage in compared.stages:
                found = self._look_at(step, work, block, stage, stream, compared.last)
                self._take(
                    step, work, block, stage, replace(found, gradient_OI=compared.gradient_OI, trial=trial), exchanged
                )
        loss_after_N = loss_before_N
        # What is in the stream then are outputs with the masks in between, even where the last step led back.
        if compared_anew or self._has_changed(work, block):
            loss_after_N = passes.finish(work, block, stream)
        work.rebuilt += 1
        losses = [passes.mean(loss_before_N), passes.mean(loss_after_N)]
        self._checks.order({f"{work.layer.name}.{block.name}: the loss with the rebuilt mask": losses[1]})
        return exchanged, losses

    def _look_at(
        self, step: Rebuild, work: LayerWork, block: Block, stage: Sequence[str], stream: Stream, last: str | None
    ) -> Evidence:
        """What a step wants to know of the inputs of linears that share them."""
        assert step.needs.statistic is not None
        statistic = step.needs.statistic(len(self.tokens_NL))
        if not step.needs.dense:
            mean = self._passes.look_at_inputs(work, block, stage, stream, statistic)
            evidence = Evidence(inputs=dict.fromkeys(stage, mean))
        else:
            assert self._dense is not None
            writes = work.adds_outputs and list(stage) == [last]
            mean, drift, residual = self._passes.look_at_both(
                work, block, stage, stream, self._dense, statistic, writes
            )
            evidence = Evidence(
                inputs=dict.fromkeys(stage, mean),
                drift=dict.fromkeys(stage, drift),
                residual=dict.fromkeys(stage, residual) if residual is not None else {},
            )
        self._checks.order({f"{stage[0]}: its input": mean})
        return evidence

    def _take(
        self,
        step: Rebuild,
        work: LayerWork,
        block: Block,
        names: Sequence[str],
        evidence: Evidence,
        exchanged: Exchanged,
    ) -> None:
        """Take a step for some linears of a block, and let them use the weights that it leaves."""
        with self.stopwatch("exchange"):
            dense_OI = {name: work.dense_OI[name] for name in names}
            current = {name: work.current[name] for name in names}
            rebuilt = step.rebuild(dense_OI, current, evidence, self.pattern)
        self._checks.order({f"{name}: the score": found.score for name, found in rebuilt.items()})
        for name, found in rebuilt.items():
            work.current[name] = exchanged.final[name] = found.pruned
            before = exchanged.num_exchanged.get(name)
            exchanged.num_exchanged[name] = found.num_exchanged if before is None else before + found.num_exchanged
        linears = [linear for linear in block.linears if linear.name in rebuilt]
        self._passes.assign(linears, {name: found.pruned.weight_OI for name, found in rebuilt.items()}, self._forward)

    def _has_changed(self, work: LayerWork, block: Block) -> bool:
        """Whether the block's weights are others than those of the initial masks, whose outputs are there already.

        A small model exchanges nothing in most of its blocks where the ratio is small. A GPU is not asked.
        """
        names = [linear.name for linear in block.linears]
        same = (torch.equal(work.current[name].weight_OI, work.initial[name].weight_OI) for name in names)
        return self.device.type != "cpu" or not all(same)

    def _observing(self, linears: list[Linear], stop: bool = True) -> AbstractContextManager[dict[str, InputStatistic]]:
        """The statistic that the pruner needs of the linears' inputs; `stop` when nothing is left to see."""
        assert self.pruner.statistic is not None
        modules = {linear.name: linear.module for linear in linears}
        return observing_inputs(modules, partial(self.pruner.statistic, len(self.tokens_NL)), stop)
