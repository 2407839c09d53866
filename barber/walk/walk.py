"""The walk: decoder layer by decoder layer, prune, then rebuild the mask block by block.

Two streams of activations advance together. The initial mask needs inputs that ran through *pruned* layers, the
rebuilding needs inputs that ran through *rebuilt* layers; both are brought one layer further before the next begins.
Steps of the rebuilding that follow the dense model have a third, which runs through dense layers.
So the dense weights of one layer at a time are held beside the model, and a finished layer is never touched again.
"""

import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel

from barber.errors import NumericsError
from barber.methods.block import Pruned
from barber.methods.patterns import Pattern, for_each
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.model.blocks import Block
from barber.model.decoder import Decoder
from barber.model.driver import Driver, Stream, Turn
from barber.model.weights import InMemory, Weights
from barber.runtime.activations import Activations, ActivationStore
from barber.runtime.distributed import Ranks
from barber.runtime.memory import keep_freed_memory
from barber.runtime.numerics import FiniteChecks
from barber.runtime.precision import Precision
from barber.runtime.tensors import Tensor, batches
from barber.runtime.timing import Stopwatch
from barber.walk.comparison import INITIAL_LOSS, Comparison
from barber.walk.initial import InitialMasks
from barber.walk.passes import Passes
from barber.walk.rebuilding import Exchanged, Rebuilding
from barber.walk.selection import Selection
from barber.walk.work import LayerWork

Schedule = Literal["paper", "interleaved"]


@dataclass(frozen=True)
class LinearResult:
    """What became of one linear: as the pruner left it, and as it is in the model now (float32).

    Args:
        dense_zeros, pruned_zeros, zeros: exact zeros of the weight as it is stored: when it came, as the pruner left
            it, and now.
        is_pruned: False: it was left out and is dense.
    """

    name: str
    initial: Pruned
    final: Pruned
    dense_zeros: int
    pruned_zeros: int
    zeros: int
    num_exchanged: int = 0
    is_pruned: bool = True


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
        by_step: pairs that each step of the rebuilding exchanged.
    """

    layer: int
    block: str
    linears: list[LinearResult]
    seconds: float
    loss_before: float | None = None
    loss_after: float | None = None
    by_step: list[int] = field(default_factory=list)


@dataclass
class Walk:
    """One pass over the decoder layers of a model, which is changed in place.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        tokens_NL: calibration token ids, int64, of all processes.
        pattern: what the masks look like, of all linears or of each by name; a linear without one stays dense.
        pruner: the method of the initial masks.
        steps: of the rebuilding, in order; none leave the initial masks.
        device: where the layers are computed, one at a time.
        batch_size: samples that go through a layer together.
        weights: where the layers' weights come from and go to; None: they are the model's own.
        precision: of the matrix products.
        store: where activations wait; None: on the device.
        schedule: `paper`: the initial mask is computed on a stream of its own, through pruned layers. `interleaved`:
            on the inputs that the rebuilding has, block by block; the dense pass serves both then.
        keep_graphs: for `interleaved`, keep the dense passes of all samples until the mask is known, instead of
            running them again.
        initial: initial masks that are kept across runs: read where they are complete, otherwise written. Not for
            `interleaved`, whose initial masks depend on the rebuilding.
        begin: the layer to begin with, the ones before it being finished.
        restore: fills the streams, by name, where `begin` is not 0.
        gradients: mean over samples of the squared gradient of the language-model loss by every linear's weight, for
            pruners that ask for it.
    """

    model: PreTrainedModel
    tokens_NL: Tensor
    pattern: Pattern | Mapping[str, Pattern]
    pruner: Pruner
    steps: Sequence[Rebuild]
    device: torch.device
    batch_size: int
    weights: Weights | None = None
    precision: Precision = field(default_factory=Precision)
    store: ActivationStore | None = None
    schedule: Schedule = "paper"
    keep_graphs: bool = True
    initial: InitialMasks | None = None
    begin: int = 0
    restore: Callable[[dict[str, Activations]], None] | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Activations] = field(default_factory=dict, init=False)
    initial_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.ranks = Ranks.present()
        self.stopwatch = Stopwatch(self.device)
        forward, gradient = self.precision.on(self.device)
        self._checks = FiniteChecks(self.ranks)
        interleaves = self.schedule == "interleaved" and bool(self.steps) and self.pruner.statistic is not None
        assert self.initial is None or not interleaves
        knows_initial = self.initial is not None and self.initial.complete
        linears = Decoder(self.model).linears
        self._stored = {linear.name: linear.module.weight.dtype for linear in linears}
        self._patterns = for_each(self.pattern, self._stored)
        self._passes = Passes(
            self.device,
            forward,
            gradient,
            self._checks,
            self.stopwatch,
            self.ranks,
            len(self.tokens_NL),
            self.keep_graphs,
        )
        self._selection = Selection(self.pruner, self._patterns, self.gradients, self._passes)
        self._interleaves = interleaves
        # The initial masks need inputs of their own where they are not known and may not have those of the rebuilding.
        needs_inputs = self.pruner.statistic is not None and not (interleaves or knows_initial)
        self.has_two_streams = bool(self.steps) and needs_inputs

    def __iter__(self) -> Iterator[BlockResult]:
        """Prune and rebuild layer by layer; give the results of a layer's blocks when the layer is done.

        Raises:
            NumericsError: NaN or infinite weights, activations, losses or scores; the layer is left as it was.
            BarberError: no sample reaches a linear, or the processes disagree.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        weights = self.weights or InMemory(self.model)
        # Out of inference mode, which the caller may be in: no gradient can be had there.
        with self.stopwatch("capture"), torch.inference_mode(False), torch.no_grad():
            pruned, rebuilt, dense, targets = self._start()
            if self.begin and self.restore is not None:
                self.restore(self.streams)
        selection = self._selection if self._interleaves else None
        rebuilding = Rebuilding(self.steps, self._patterns, self._passes, selection, dense) if self.steps else None

        def look(turn: Turn) -> deque[BlockResult]:
            # Nothing holds on to the layer before: in float32, with both masks' weights, it is three layers more.
            work = LayerWork.begun(turn, targets, self._patterns)
            return deque(self._layer(work, pruned, rebuilt, rebuilding))

        try:
            for results in Driver(self.model, weights, self.device, keeps=True).each(look, self.begin):
                while results:
                    yield results.popleft()
        finally:
            weights.finish()

    def _start(self) -> tuple[Stream, Stream, Stream | None, Activations | None]:
        """The streams of the initial masks, of the rebuilding and of the dense model, and room for the targets."""
        decoder = Decoder(self.model)
        tokens_NL = self.tokens_NL[self.ranks.share(len(self.tokens_NL))]
        store = self.store or ActivationStore("device", self.device, self._passes.forward.dtype)
        tries = any(step.needs.trial for step in self.steps)
        inputs = decoder.inputs(tokens_NL, self.batch_size, store, also=(1,) if tries else ())
        hidden = inputs.hidden
        num_blocks = max(len(layer.blocks) for layer in decoder.layers)

        def room() -> list[Activations]:
            return [store.empty(*hidden.shape) for _ in range(num_blocks)]

        def copied() -> Stream:
            stream = Stream(inputs, store.empty(*hidden.shape), self.batch_size, room())
            for batch in batches(len(tokens_NL), self.batch_size):
                stream.hidden[batch] = hidden[batch]
            return stream

        pruned = Stream(inputs, hidden, self.batch_size)
        rebuilt, dense, targets = pruned, None, None
        if self.steps:
            targets = store.empty(*hidden.shape)
            rebuilt = copied() if self.has_two_streams else Stream(inputs, hidden, self.batch_size, room())
        self.streams = {"pruned": pruned.hidden, "rebuilt": rebuilt.hidden}
        if any(step.needs.dense for step in self.steps):
            dense = copied()
            self.streams["dense"] = dense.hidden
        return pruned, rebuilt, dense, targets

    def _layer(
        self, work: LayerWork, pruned: Stream, rebuilt: Stream, rebuilding: Rebuilding | None
    ) -> Iterator[BlockResult]:
        start = time.perf_counter()
        self._checks.order({f"{name}: the weight": weight_OI for name, weight_OI in work.dense_OI.items()})
        self._choose(work, pruned)
        if rebuilding is not None and rebuilding.dense is not None:
            work.adds_outputs = self._passes.adds_outputs(work, rebuilding.dense)
        for block in work.layer.blocks:
            if rebuilding is None:
                exchanged = Exchanged.none(work, block, num_steps=0)
                losses: list[Tensor] = []
            else:
                exchanged, losses = rebuilding.rebuild(work, block, rebuilt)
            yield self._look(work, block, rebuilt, exchanged, losses, start)
            start = time.perf_counter()
        if rebuilding is not None:
            self._passes.propagate(work, rebuilt)
            if rebuilding.dense is not None:
                self._passes.propagate(work, rebuilding.dense)
            self._checks.require()
        work.layer.keep(work.weights(work.layer))
        found = {name: (pruned.mask_OI, pruned.weight_OI) for name, pruned in work.current.items()}
        self.ranks.require_agreement(work.layer.name, found)

    def _choose(self, work: LayerWork, pruned: Stream) -> None:
        """The initial masks of the layer, if they do not wait for its rebuilding."""
        start = time.perf_counter()
        if self.initial is not None and self.initial.complete:
            with self.stopwatch("select"):
                work.initial = self.initial.read(work.index, work.dense_OI)
                work.current = dict(work.initial)
        elif not self._interleaves:
            self._selection.prune_layer(work, pruned)
            self.initial_seconds += time.perf_counter() - start
            if self.initial is not None:
                self.initial.write(work.index, work.dense_OI, work.initial)

    def _look(
        self,
        work: LayerWork,
        block: Block,
        stream: Stream,
        exchanged: Exchanged,
        losses: list[Tensor],
        start: float,
    ) -> BlockResult:
        """Wait for the device: the one time in a block that its figures and checks are looked at."""
        names = [linear.name for linear in block.linears]
        zeros = _zeros(work, exchanged.final, {name: self._stored[name] for name in names})
        ordered = [*losses, *zeros, *exchanged.by_step, *exchanged.counts(names)]
        found = iter(torch.stack([figure.double() for figure in ordered]).tolist())
        if (failed := self._checks.first_failed()) is not None:
            culprit = None
            if failed.endswith(INITIAL_LOSS):
                work.rebuilt = work.layer.blocks.index(block)
                culprit = Comparison(self._passes, work, block, stream, with_gradient=False).overflowing()
            raise NumericsError(f"{culprit or failed} is NaN or infinite")
        loss_before, loss_after = (next(found), next(found)) if losses else (None, None)
        zeros_of = {name: (int(next(found)), int(next(found)), int(next(found))) for name in names}
        by_step = [int(next(found)) for _ in exchanged.by_step]
        linears = [
            _linear(work, exchanged, name, zeros_of[name], int(next(found, 0)), self._patterns) for name in names
        ]
        seconds = time.perf_counter() - start
        return BlockResult(work.index, block.name, linears, seconds, loss_before, loss_after, by_step)


def _linear(
    work: LayerWork,
    exchanged: Exchanged,
    name: str,
    zeros: tuple[int, int, int],
    num_exchanged: int,
    turns: Container[str],
) -> LinearResult:
    return LinearResult(name, work.initial[name], exchanged.final[name], *zeros, num_exchanged, name in turns)


def _zeros(work: LayerWork, final: Mapping[str, Pruned], stored: Mapping[str, torch.dtype]) -> list[Tensor]:
    """Zeros of linears as they are stored, three of each: when it came, as the pruner left it, and now."""
    return [
        (weight_OI.to(dtype) == 0).sum()
        for name, dtype in stored.items()
        for weight_OI in (work.dense_OI[name], work.initial[name].weight_OI, final[name].weight_OI)
    ]
