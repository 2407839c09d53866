"""Passes of the samples through a block: what the steps of a rebuilding look at comes from here.

Two streams of activations matter to a block. On the *rebuilt* one it is run with sparse and with dense weights on the
same inputs; the difference of the outputs is the block's error. The *dense* one, kept only where a step asks for it,
has what the dense model would feed the block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from barber.methods.statistics import CrossMoment, InputStatistic
from barber.model.blocks import Block, Call
from barber.model.driver import Stream
from barber.model.observing import capturing_inputs
from barber.runtime.distributed import Ranks
from barber.runtime.numerics import FiniteChecks
from barber.runtime.precision import Arithmetic
from barber.runtime.tensors import Tensor, converted
from barber.runtime.timing import Stopwatch
from barber.walk.work import LayerWork, Stage, sample_losses


@dataclass(frozen=True)
class Seen:
    """What a pass has seen of the inputs of a stage's linears: `inputs`, `drift` and `residual` of a `BlockState`."""

    inputs: dict[str, Tensor]
    drift: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Passes:
    """Runs the samples of this process through blocks.

    Args:
        forward, gradient: how products of plain and of differentiated passes are computed.
        num_samples: of all processes.
        keep_graphs: where a block has no mask yet, keep the dense passes of all samples until it has one.
    """

    device: torch.device
    forward: Arithmetic
    gradient: Arithmetic
    checks: FiniteChecks
    stopwatch: Stopwatch
    ranks: Ranks
    num_samples: int
    keep_graphs: bool

    def look_at_inputs(
        self, work: LayerWork, block: Block, stage: Stage, stream: Stream, statistic: type[InputStatistic]
    ) -> Seen:
        """The mean of a statistic of what the linears of a stage are fed now, all in one pass."""
        statistics = [statistic(self.num_samples) for _ in stage.inputs]
        with self.stopwatch("statistics"), block.using(work.weights(block), self.forward):
            for batch, call in stream.calls(work.index):
                for one, x_TI in zip(statistics, self._fed(work, block, stage, stream, batch, call), strict=True):
                    one.add(x_TI)
            means = [statistics.pop(0).value(self.ranks) for _ in stage.inputs]
        return Seen(_shared(stage, means))

    def look_at_both(
        self,
        work: LayerWork,
        block: Block,
        stage: Stage,
        stream: Stream,
        dense: Stream,
        statistic: type[InputStatistic],
        writes: str | None,
    ) -> Seen:
        """That, and how far away the dense model is.

        Args:
            writes: the linear whose output is added to the residual stream.
        """
        current_OI, count = work.weights(block), len(stage.inputs)
        statistics = [statistic(self.num_samples) for _ in range(count)]
        drifts, residual = [CrossMoment(self.num_samples) for _ in range(count)], CrossMoment(self.num_samples)
        of_writing = next((number for number, names in enumerate(stage.inputs) if writes in names), None)
        with self.stopwatch("statistics"):
            calls = zip(stream.calls(work.index), dense.calls(work.index), strict=True)
            for (batch, call), (_, dense_call) in calls:
                with block.using(current_OI, self.forward):
                    fed = self._fed(work, block, stage, stream, batch, call)
                    for one, x_TI in zip(statistics, fed, strict=True):
                        one.add(x_TI)
                with block.using(work.dense_OI, self.forward):
                    dense_fed = self._fed(work, block, stage, dense, batch, dense_call)
                    for drift, x_TI, dense_TI in zip(drifts, fed, dense_fed, strict=True):
                        drift.add(dense_TI - x_TI, x_TI)
                if of_writing is not None:
                    lost_BLD = dense.residual(work.rebuilt, batch) - stream.residual(work.rebuilt, batch)
                    residual.add(lost_BLD.flatten(0, -2), fed[of_writing])
            lost = {writes: residual.value(self.ranks)} if writes is not None and of_writing is not None else {}
            means = [statistics.pop(0).value(self.ranks) for _ in range(count)]
            drift_II = [drifts.pop(0).value(self.ranks) for _ in range(count)]
        return Seen(_shared(stage, means), _shared(stage, drift_II), lost)

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

    def finish(self, work: LayerWork, block: Block, stream: Stream) -> list[Tensor]:
        """Run the block with the weights that it has now, keep its outputs, and return the samples' losses."""
        assert work.targets is not None
        loss_N = []
        with self.stopwatch("propagate"), block.using(work.weights(block), self.forward):
            for batch, call in stream.calls(work.index):
                _, y = work.layer.run_block(work.rebuilt, call, stream.done(work.rebuilt, batch))
                loss_N.append(sample_losses(y, work.targets[batch], batch.stop - batch.start))
                stream.outputs[work.rebuilt][batch] = y
        return loss_N

    def finish_dense(self, work: LayerWork, block: Block, dense: Stream) -> None:
        """Run the block as the dense model does, and keep its outputs."""
        with self.stopwatch("propagate"), block.using(work.dense_OI, self.forward):
            for batch, call in dense.calls(work.index):
                _, y = work.layer.run_block(work.rebuilt, call, dense.done(work.rebuilt, batch))
                dense.outputs[work.rebuilt][batch] = y

    def propagate(self, work: LayerWork, stream: Stream) -> None:
        """Bring a stream to the next layer, given the outputs of all blocks."""
        layer = work.layer
        with self.stopwatch("propagate"), self.forward():
            stream.advance(
                work.index,
                lambda batch, call: layer.finish(call, stream.done(len(layer.blocks), batch)),
                layer.name,
                self.checks,
            )

    def mean(self, loss_N: list[Tensor]) -> Tensor:
        """The mean over all samples of all processes: (), float64."""
        return self.ranks.all_reduce_sum(torch.cat(loss_N).double().sum()) / self.num_samples

    def cast(self, value: Any) -> Any:
        """A call or a tensor in the precision of gradients, if that is higher than that of forward passes."""
        if self.gradient.dtype == self.forward.dtype or self.gradient.dtype != torch.float32:
            return value
        if isinstance(value, Call):
            return Call(*(converted(part, self.device) for part in (value.x, value.args, value.kwargs)))
        return converted(value, self.device)

    def _fed(
        self, work: LayerWork, block: Block, stage: Stage, stream: Stream, batch: slice, call: Call
    ) -> list[Tensor]:
        """What the linears of a stage of the block at work are fed: (T, I) for each of the stage's inputs."""
        modules = {linear.name: linear.module for linear in block.linears}
        with capturing_inputs([modules[names[0]] for names in stage.inputs]) as fed:
            work.layer.run_block(work.rebuilt, call, stream.done(work.rebuilt, batch))
        return fed


def _shared(stage: Stage, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """A value for every linear, one and the same tensor for those that share their input."""
    return {name: value for names, value in zip(stage.inputs, values, strict=True) for name in names}
