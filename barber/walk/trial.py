"""A block as something to be tried out: its loss and gradients with any weights, on the inputs that it has."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from barber.model.blocks import Block, Call
from barber.model.driver import Stream
from barber.model.observing import observing_outputs
from barber.runtime.tensors import Tensor
from barber.walk.passes import Passes
from barber.walk.work import LayerWork, sample_losses


@dataclass
class BlockTrial:
    """A block that can be run with any weights: see `barber.methods.block.Trial`."""

    passes: Passes
    work: LayerWork
    block: Block
    stream: Stream
    dense: Stream | None = None

    @property
    def num_samples(self) -> int:
        return self.passes.num_samples

    def loss(self, weight_OI: Mapping[str, Tensor], samples: slice) -> Tensor:
        return self._run(weight_OI, samples, None, 0.0)

    def gradient(
        self, weight_OI: Mapping[str, Tensor], samples: slice, follow: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sums_OI: dict[str, Tensor] = {}
        loss = self._run(weight_OI, samples, sums_OI, follow)
        for name, current_OI in self.work.weights(self.block).items():
            sum_OI = sums_OI.get(name, torch.zeros_like(current_OI))
            sums_OI[name] = self.passes.ranks.all_reduce_sum(sum_OI) / _length(samples)
        return loss, sums_OI

    def _target(self, batch: slice, follow: float) -> Tensor:
        """The output that a batch aims at."""
        work = self.work
        assert work.targets is not None
        target = work.targets[batch]
        if not follow:
            return target
        assert self.dense is not None
        drift = self.dense.outputs[work.rebuilt][batch] - target
        if work.adds_outputs:
            drift += self.dense.residual(work.rebuilt, batch) - self.stream.residual(work.rebuilt, batch)
        return target + follow * drift

    def _run(
        self, weight_OI: Mapping[str, Tensor], samples: slice, sums_OI: dict[str, Tensor] | None, follow: float
    ) -> Tensor:
        """The mean loss; sums over samples of its gradients by weights are added to `sums_OI`, unless that is None."""
        passes, work = self.passes, self.work
        mine = passes.ranks.share(passes.num_samples)
        local = slice(max(samples.start - mine.start, 0), min(samples.stop, mine.stop) - mine.start)
        total = torch.zeros((), dtype=torch.float64, device=passes.device)
        arithmetic = passes.forward if sums_OI is None else passes.gradient
        with passes.stopwatch("try"), self.block.using({**work.weights(self.block), **weight_OI}, arithmetic):
            for batch, call in self.stream.calls(work.index, local):
                if sums_OI is None:
                    _, y = work.layer.run_block(work.rebuilt, call, self.stream.done(work.rebuilt, batch))
                    total += sample_losses(y, self._target(batch, follow), 1)[0].double()
                else:
                    total += self._differentiate(batch, call, sums_OI, follow)
        return passes.ranks.all_reduce_sum(total) / _length(samples)

    def _differentiate(self, batch: slice, call: Call, sums_OI: dict[str, Tensor], follow: float) -> Tensor:
        """The loss of one sample, whose gradients are added to `sums_OI`: (), float64."""
        passes, work = self.passes, self.work
        modules = {linear.name: linear.module for linear in self.block.linears}
        done = [passes.cast(output) for output in self.stream.done(work.rebuilt, batch)]
        with torch.enable_grad(), observing_outputs(modules) as observed:
            _, y = work.layer.run_block(work.rebuilt, passes.cast(call), done)
            loss = sample_losses(y, self._target(batch, follow), 1)[0]
            gradients = torch.autograd.grad(loss, [one.edge for one in observed.values() if one.edge])
        for (name, one), gradient in zip(observed.items(), gradients, strict=True):
            product_OI = (gradient.flatten(0, -2).T @ one.x.flatten(0, -2).to(gradient.dtype)).float()
            sums_OI[name] = sums_OI[name] + product_OI if name in sums_OI else product_OI
        return loss.detach().double()


def _length(samples: slice) -> int:
    return int(samples.stop - samples.start)
