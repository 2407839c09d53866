"""The rebuilding of a block's masks, step by step; each step sees the block as the one before left it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from barber.methods.block import BlockState, Pruned
from barber.methods.patterns import Pattern
from barber.methods.rebuild import Needs, Rebuild
from barber.model.blocks import Block
from barber.model.driver import Stream
from barber.runtime.tensors import Tensor
from barber.walk.comparison import Compared, Comparison
from barber.walk.passes import Passes, Seen
from barber.walk.selection import Selection
from barber.walk.trial import BlockTrial
from barber.walk.work import LayerWork, Stage


@dataclass
class Exchanged:
    """The linears of a block with their rebuilt masks, and the pairs exchanged, by linear and by step: (), int64."""

    final: dict[str, Pruned]
    num_exchanged: dict[str, Tensor]
    by_step: list[Tensor]

    @classmethod
    def none(cls, work: LayerWork, block: Block, num_steps: int) -> "Exchanged":
        """A block as the pruner left it."""
        final = {linear.name: work.initial[linear.name] for linear in block.linears}
        device = next(iter(final.values())).mask_OI.device
        return cls(final, {}, list(torch.zeros(num_steps, dtype=torch.int64, device=device)))

    def counts(self, names: Sequence[str]) -> list[Tensor]:
        """The pairs that linears exchanged, in their order; empty where no step was taken."""
        known = self.num_exchanged
        none = torch.zeros_like(next(iter(known.values()))) if known else None
        return [known.get(name, none) for name in names] if none is not None else []


@dataclass(frozen=True)
class Rebuilding:
    """Takes the steps of a rebuilding, one block after the other.

    Args:
        steps: in order, each as often as it wants to be taken.
        patterns: what the masks look like, by linear; it is never the turn of one that has none.
        selection: of the initial masks, where a block has none yet (`interleaved`).
        dense: the stream of the dense model, where a step asks for it.
    """

    steps: Sequence[Rebuild]
    patterns: Mapping[str, Pattern]
    passes: Passes
    selection: Selection | None
    dense: Stream | None

    def rebuild(self, work: LayerWork, block: Block, stream: Stream) -> tuple[Exchanged, list[Tensor]]:
        """Rebuild the masks of the layer's next block.

        Returns the linears with their new masks, and the block's losses with the initial and the rebuilt masks.
        """
        passes = self.passes
        turns = [linear.name for linear in block.linears if linear.name in self.patterns]
        compared = self._compare(work, block, stream, turns)
        if self.dense is not None:
            passes.finish_dense(work, block, self.dense)
        loss_before_N = compared.loss_N
        exchanged = Exchanged.none(work, block, len(self.steps))
        compared_anew = False
        takes = [index for index, step in enumerate(self.steps) for _ in range(step.needs.passes)] if turns else []
        for number, index in enumerate(takes):
            needs = self.steps[index].needs
            if needs.gradient and number > 0:
                compared = Comparison(passes, work, block, stream, with_gradient=True).of_current()
                compared_anew = True
            trial = BlockTrial(passes, work, block, stream, self.dense) if needs.trial else None
            if needs.statistic is None:
                self._take(index, work, self._state(work, turns, turns, compared, Seen({}), trial), exchanged)
                continue
            for stage in filter(None, (stage.among(turns) for stage in compared.stages)):
                seen = self._look(needs, work, block, stage, stream, compared.last)
                state = self._state(work, turns, stage.names, compared, seen, trial)
                self._take(index, work, state, exchanged)
        loss_after_N = loss_before_N
        # What is in the stream then are outputs with the masks in between, even where the last step led back.
        if compared_anew or self._has_changed(work, block):
            loss_after_N = passes.finish(work, block, stream)
        work.rebuilt += 1
        losses = [passes.mean(loss_before_N), passes.mean(loss_after_N)]
        passes.checks.order({f"{work.layer.name}.{block.name}: the loss with the rebuilt mask": losses[1]})
        return exchanged, losses

    def _compare(self, work: LayerWork, block: Block, stream: Stream, turns: Sequence[str]) -> Compared:
        """The block with its initial masks against the dense one; chosen first where it has none."""
        comparison = Comparison(self.passes, work, block, stream, bool(turns) and self.steps[0].needs.gradient)
        selection = self.selection
        if selection is None or not turns:
            return comparison.of_current()
        return comparison.of_initial(
            lambda: selection.observing(block, stop=not self.passes.keep_graphs),
            lambda statistics: selection.prune_block(work, block, statistics),
        )

    def _look(
        self, needs: Needs, work: LayerWork, block: Block, stage: Stage, stream: Stream, last: str | None
    ) -> Seen:
        """What a step wants to know of the inputs of a stage's linears."""
        assert needs.statistic is not None
        if not needs.dense:
            seen = self.passes.look_at_inputs(work, block, stage, stream, needs.statistic)
        else:
            assert self.dense is not None
            writes = last if work.adds_outputs and stage.names == [last] else None
            seen = self.passes.look_at_both(work, block, stage, stream, self.dense, needs.statistic, writes)
        for names in stage.inputs:
            self.passes.checks.order({f"{names[0]}: its input": seen.inputs[names[0]]})
        return seen

    def _state(
        self,
        work: LayerWork,
        turns: Sequence[str],
        names: Sequence[str],
        compared: Compared,
        seen: Seen,
        trial: BlockTrial | None,
    ) -> BlockState:
        """The block as a step sees it when it is the turn of some of its linears; of those left out it sees nothing."""
        return BlockState(
            names,
            {name: work.dense_OI[name] for name in turns},
            {name: self.patterns[name] for name in turns},
            {name: work.current[name] for name in turns},
            seen.inputs,
            compared.gradient_OI,
            seen.drift,
            seen.residual,
            trial,
        )

    def _take(self, index: int, work: LayerWork, state: BlockState, exchanged: Exchanged) -> None:
        """Take a step, whose masks and weights are those of the block from now on."""
        with self.passes.stopwatch("exchange"):
            rebuilt = self.steps[index].rebuild(state)
        self.passes.checks.order({f"{name}: the score": found.score for name, found in rebuilt.items()})
        for name, found in rebuilt.items():
            work.current[name] = exchanged.final[name] = found.pruned
            before = exchanged.num_exchanged.get(name)
            exchanged.num_exchanged[name] = found.num_exchanged if before is None else before + found.num_exchanged
            exchanged.by_step[index] = exchanged.by_step[index] + found.num_exchanged

    def _has_changed(self, work: LayerWork, block: Block) -> bool:
        """Whether the block's weights are others than those of the initial masks, whose outputs are there already.

        A small model exchanges nothing in most of its blocks where the ratio is small. A GPU is not asked.
        """
        names = [linear.name for linear in block.linears]
        same = (torch.equal(work.current[name].weight_OI, work.initial[name].weight_OI) for name in names)
        return self.passes.device.type != "cpu" or not all(same)
