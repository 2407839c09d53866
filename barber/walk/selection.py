"""The initial masks: what the pruner is shown of a layer, and what it chooses."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial

from barber.errors import NumericsError
from barber.methods.block import BlockState
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.methods.statistics import InputStatistic, MeanSquaredGradient
from barber.model.blocks import Block, Layer, Linear
from barber.model.driver import Stream
from barber.model.observing import AllFed, observing_inputs
from barber.runtime.tensors import Tensor
from barber.walk.loss_gradients import add_norm_gradients
from barber.walk.passes import Passes
from barber.walk.work import LayerWork, require_all_fed


@dataclass(frozen=True)
class Selection:
    """Gives linears their initial masks.

    Args:
        patterns: what the masks look like, by linear; those without one are left as they are.
        gradients: of the language-model loss, by linear, for pruners that ask for them.
    """

    pruner: Pruner
    patterns: Mapping[str, Pattern]
    gradients: Mapping[str, Tensor]
    passes: Passes

    def prune_layer(self, work: LayerWork, stream: Stream) -> None:
        """Give every linear of the layer its initial mask, and bring the stream to the next layer."""
        layer, passes = work.layer, self.passes
        statistics: dict[str, InputStatistic] = {}
        if self.pruner.statistic is not None and self._turns(layer):
            with (
                passes.stopwatch("statistics"),
                self.observing(layer) as statistics,
                layer.using(work.dense_OI, passes.forward),
            ):
                for _, call in stream.calls(work.index):
                    with suppress(AllFed):
                        layer.run(call)
        gradient_OI = self._norm_gradients(work, stream)
        for block in layer.blocks:
            self.prune_block(work, block, statistics, gradient_OI)
        is_last = work.index + 1 == len(stream.inputs.calls)
        if self.pruner.statistic is not None and not is_last:
            with passes.stopwatch("propagate"), layer.using(work.weights(layer), passes.forward):
                stream.advance(work.index, lambda _, call: layer.run(call), layer.name, passes.checks)

    def prune_block(
        self,
        work: LayerWork,
        block: Block,
        statistics: dict[str, InputStatistic],
        gradient_OI: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Choose the initial masks of a block, given the statistics of its linears' inputs, which are used up."""
        passes, names = self.passes, [linear.name for linear in self._turns(block)]
        if not names:
            return
        known_OI = {**self.gradients, **(gradient_OI or {})}
        with passes.stopwatch("select"):
            state = BlockState(
                names,
                {name: work.dense_OI[name] for name in names},
                {name: self.patterns[name] for name in names},
                inputs=self._means(names, statistics) if self.pruner.statistic is not None else {},
                gradient_OI={name: known_OI[name].to(passes.device) for name in names if name in known_OI},
            )
            try:
                pruned = self.pruner.prune(state)
            except NumericsError:
                passes.checks.require()  # what it comes from, if anything
                raise
            work.initial |= pruned
            work.current |= pruned
            passes.checks.order({f"{name}: the pruned weight": pruned[name].weight_OI for name in names})

    def observing(self, part: Layer | Block, stop: bool = True) -> AbstractContextManager[dict[str, InputStatistic]]:
        """The statistic that the pruner needs of the linears' inputs; `stop` when nothing is left to see."""
        assert self.pruner.statistic is not None
        modules = {linear.name: linear.module for linear in self._turns(part)}
        return observing_inputs(modules, partial(self.pruner.statistic, self.passes.num_samples), stop)

    def _turns(self, part: Layer | Block) -> list[Linear]:
        """The linears that are to be pruned."""
        return [linear for linear in part.linears if linear.name in self.patterns]

    def _means(self, names: Sequence[str], statistics: dict[str, InputStatistic]) -> dict[str, Tensor]:
        """The means over all samples, one tensor for linears that share their input; the sums are let go of."""
        require_all_fed(names, list(statistics))
        found: dict[str, Tensor] = {}
        means: dict[int, tuple[InputStatistic, Tensor]] = {}  # with what they are of, whose id nobody else gets so
        for name in names:
            statistic = statistics.pop(name)
            if id(statistic) not in means:
                means[id(statistic)] = statistic, statistic.value(self.passes.ranks)
                self.passes.checks.order({f"{name}: its input": means[id(statistic)][1]})
            found[name] = means[id(statistic)][1]
        return found

    def _norm_gradients(self, work: LayerWork, stream: Stream) -> dict[str, Tensor]:
        """Squared gradients of the norm of the layer's output, where the pruner asks for them."""
        if self.pruner.gradient != "layer":
            return {}
        passes, layer = self.passes, work.layer
        squared = {linear.name: MeanSquaredGradient(passes.num_samples) for linear in layer.linears}
        with passes.stopwatch("squared gradients"), layer.using(work.dense_OI, passes.gradient):
            for _, call in stream.calls(work.index):
                add_norm_gradients(layer, call, squared)
        return {name: one.value(passes.ranks) for name, one in squared.items()}
