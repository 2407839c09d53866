"""A block's error and its gradients: the block run with dense and with pruned weights on the same inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field

import torch

from barber.methods.statistics import InputStatistic, MeanSquaredGradient
from barber.model.blocks import Block, Call, Linear
from barber.model.driver import Stream
from barber.model.families import PHASES
from barber.model.observing import AllFed, Observed, observing_outputs
from barber.runtime.tensors import Tensor, by_sample
from barber.walk.passes import Passes
from barber.walk.work import LayerWork, Stage, require_all_fed, sample_losses

INITIAL_LOSS = "the loss with the initial mask"

Observing = AbstractContextManager[dict[str, InputStatistic]]


@dataclass(frozen=True)
class Compared:
    """What came out of a comparison.

    Args:
        stages: of the block's linears, in the order in which they run.
        last: the linear whose output is the block's.
        loss_N: every sample's loss, batch by batch.
        gradient_OI: mean over samples of the squared gradient of every linear, where it was asked for.
    """

    stages: list[Stage]
    last: str | None
    loss_N: list[Tensor]
    gradient_OI: dict[str, Tensor]


@dataclass
class Comparison:
    """Runs the block at work with dense and with pruned weights, and takes the gradients of the difference.

    A gradient is taken at the dense weights, for one sample's loss at a time (arXiv 2408.10631, section 3.3). The dense
    outputs go to the layer's targets, the others to the stream.

    Args:
        with_gradient: whether gradients are asked for.
    """

    passes: Passes
    work: LayerWork
    block: Block
    stream: Stream
    with_gradient: bool
    _squared: dict[str, MeanSquaredGradient] = field(default_factory=dict, init=False)
    _stages: list[Stage] = field(default_factory=list, init=False)
    _last: str | None = field(default=None, init=False)
    _loss_N: list[Tensor] = field(default_factory=list, init=False)

    def of_current(self) -> Compared:
        """Compare the weights that the block has now."""
        passes, work, block = self.passes, self.work, self.block
        current_OI = work.weights(block)
        for batch, call in self.stream.calls(work.index):
            with passes.stopwatch("compare"), block.using(current_OI, passes.forward):
                block_call, y_sparse = work.layer.run_block(work.rebuilt, call, self._done(batch))
            with block.using(work.dense_OI, passes.gradient):
                with passes.stopwatch("compare"), self._observing(self.with_gradient) as observed:
                    y_dense = block.run(passes.cast(block_call))
                self._take_in(batch, y_sparse, y_dense, observed)
        return self._finished()

    def of_initial(
        self,
        observing: Callable[[], Observing],
        select: Callable[[dict[str, InputStatistic]], None],
    ) -> Compared:
        """Compare a block that has no mask yet: the statistics for it come from the dense passes, too.

        Args:
            observing: a context that collects the pruner's statistics.
            select: gives the block its initial masks, given them.
        """
        passes, work, block = self.passes, self.work, self.block
        keeps = passes.keep_graphs
        kept: list[tuple[Call, Tensor, dict[str, Observed]]] = []
        with block.using(work.dense_OI, passes.gradient), observing() as statistics:
            for batch, call in self.stream.calls(work.index):
                with passes.stopwatch("compare" if keeps else "statistics"), suppress(AllFed):
                    kept.append(self._run_dense(batch, call, self.with_gradient and keeps))
        select(statistics)
        initial_OI = work.weights(block)
        for batch, call in self.stream.calls(work.index):
            if keeps:
                block_call, y_dense, observed = kept.pop(0)
            else:
                with passes.stopwatch("compare"), block.using(work.dense_OI, passes.gradient):
                    block_call, y_dense, observed = self._run_dense(batch, call, self.with_gradient)
            with passes.stopwatch("compare"), block.using(initial_OI, passes.forward):
                y_sparse = block.run(block_call)
            with block.using(work.dense_OI, passes.gradient):  # which the backward pass reads
                self._take_in(batch, y_sparse, y_dense, observed)
        return self._finished()

    def overflowing(self) -> str | None:
        """The first linear of the block, in words, whose input or output is NaN or infinite with the dense weights."""
        passes = self.passes
        with self.block.using(self.work.dense_OI, passes.gradient):
            for batch, call in self.stream.calls(self.work.index):
                _, _, observed = self._run_dense(batch, call, with_gradient=False)
                for name, one in observed.items():
                    for tensor in (one.x, one.y):
                        passes.checks.order({f"{name}: its input or output": tensor})
        return passes.checks.first_failed()

    def _done(self, batch: slice) -> list[Tensor]:
        return self.stream.done(self.work.rebuilt, batch)

    def _run_dense(self, batch: slice, call: Call, with_gradient: bool) -> tuple[Call, Tensor, dict[str, Observed]]:
        """Run the layer as far as the block, whose weights are dense: the block's call, its output, its linears."""
        passes = self.passes
        with self._observing(with_gradient) as observed:
            done = [passes.cast(output) for output in self._done(batch)]
            block_call, y_dense = self.work.layer.run_block(self.work.rebuilt, passes.cast(call), done)
        return block_call, y_dense, observed

    @contextmanager
    def _observing(self, with_gradient: bool) -> Iterator[dict[str, Observed]]:
        modules = {linear.name: linear.module for linear in self.block.linears}
        with torch.set_grad_enabled(with_gradient), observing_outputs(modules) as observed:
            yield observed

    def _take_in(self, batch: slice, y_sparse: Tensor, y_dense: Tensor, observed: dict[str, Observed]) -> None:
        """Add a batch, and put its outputs down; the block has its dense weights."""
        passes, num_samples = self.passes, batch.stop - batch.start
        with passes.stopwatch("compare"), torch.set_grad_enabled(self.with_gradient):
            loss_B = sample_losses(y_dense, y_sparse, num_samples)
            gradients: Sequence[Tensor] = ()
            if self.with_gradient:
                edges = [one.edge for one in observed.values() if one.edge]
                gradients = torch.autograd.grad(loss_B, edges, grad_outputs=torch.ones_like(loss_B))
        with passes.stopwatch("squared gradients"):
            for (name, one), gradient in zip(observed.items(), gradients, strict=self.with_gradient):
                squared = self._squared.setdefault(name, MeanSquaredGradient(passes.num_samples))
                squared.add(by_sample(one.x.to(gradient.dtype), num_samples), by_sample(gradient, num_samples))
        if not self._stages:
            self._stages = _stages(self.block, observed)
            ends = (name for name, one in observed.items() if one.y.data_ptr() == y_dense.data_ptr())
            self._last = next(ends, None)
        self._loss_N.append(loss_B.detach())
        assert self.work.targets is not None
        self.work.targets[batch] = y_dense.detach()
        self.stream.outputs[self.work.rebuilt][batch] = y_sparse

    def _finished(self) -> Compared:
        """All batches together."""
        passes = self.passes
        names = [linear.name for linear in self.block.linears]
        require_all_fed(names, [name for stage in self._stages for name in stage.names])
        passes.checks.order({f"{self.work.layer.name}.{self.block.name}: {INITIAL_LOSS}": torch.cat(self._loss_N)})
        gradient_OI: dict[str, Tensor] = {}
        with passes.stopwatch("squared gradients"):
            for name in list(self._squared):
                gradient_OI[name] = self._squared.pop(name).value(passes.ranks)
        passes.checks.order({f"{name}: the gradient": gradient for name, gradient in gradient_OI.items()})
        return Compared(self._stages, self._last, self._loss_N, gradient_OI)


def _stages(block: Block, observed: dict[str, Observed]) -> list[Stage]:
    """The linears that share an input, in the order in which they ran; those together that the family knows to be fed
    before any of them has answered.
    """
    inputs: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
    for name, one in observed.items():
        inputs.setdefault((one.x.data_ptr(), one.x.shape, one.x.stride()), []).append(name)
    phases = {linear.name: _phase(linear) for linear in block.linears}
    if None in phases.values():
        return [Stage([names]) for names in inputs.values()]
    stages: dict[int | None, Stage] = {}
    for names in inputs.values():
        stages.setdefault(phases[names[0]], Stage([])).inputs.append(names)
    return list(stages.values())


def _phase(linear: Linear) -> int | None:
    """When the linear is fed, by its roles; None where that is not known."""
    return next((phase for phase, roles in enumerate(PHASES) if set(linear.roles) & set(roles)), None)
