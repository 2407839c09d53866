"""A block as something to be tried out: its loss and gradients with any weights, on the inputs that it has."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from barber.methods.statistics import observing_outputs
from barber.model.blocks import Block
from barber.runtime.tensors import Tensor
from barber.walk.passes import LayerWork, Passes, Stream, sample_losses


@dataclass
class BlockTrial:
    """A block that can be run with any weights: see `barber.methods.rebuild.base.Trial`."""

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
        for name, current in self.work.current.items():
            if any(linear.name == name for linear in self.block.linears):
                sum_OI = sums_OI.get(name, torch.zeros_like(current.weight_OI))
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
        passes, work, linears = self.passes, self.work, self.block.linears
        current_OI = {linear.name: work.current[linear.name].weight_OI for linear in linears}
        arithmetic = passes.forward if sums_OI is None else passes.gradient
        passes.assign(linears, {**current_OI, **weight_OI}, arithmetic)
        mine = passes.ranks.share(passes.num_samples)
        local = slice(max(samples.start - mine.start, 0), min(samples.stop, mine.stop) - mine.start)
        total = torch.zeros((), dtype=torch.float64, device=passes.device)
        modules = {linear.name: linear.module for linear in linears}
        with passes.stopwatch("try"):
            for batch, call in self.stream.calls(work.index, local):
                done = self.stream.done(work.rebuilt, batch)
                if sums_OI is None:
                    with passes.forward():
                        _, y = work.layer.run_block(work.rebuilt, call, done)
                    total += sample_losses(y, self._target(batch, follow), 1)[0].double()
                    continue
                call, done = passes.cast(call), [passes.cast(output) for output in done]
                with torch.enable_grad(), passes.gradient(), observing_outputs(modules) as observed:
                    _, y = work.layer.run_block(work.rebuilt, call, done)
                    loss = sample_losses(y, self._target(batch, follow), 1)[0]
                    gradients = torch.autograd.grad(loss, [output for _, output in observed.values()])
                total += loss.detach().double()
                for (name, (x, _)), gradient in zip(observed.items(), gradients, strict=True):
                    product_OI = (gradient.flatten(0, -2).T @ x.flatten(0, -2).to(gradient.dtype)).float()
                    sums_OI[name] = sums_OI[name] + product_OI if name in sums_OI else product_OI
        passes.assign(linears, current_OI, passes.forward)
        return passes.ranks.all_reduce_sum(total) / _length(samples)


def _length(samples: slice) -> int:
    return int(samples.stop - samples.start)
