"""Block-wise reconstruction: train the kept weights of one block at a time towards the dense block's outputs.

"A Free Lunch in LLM Compression", arXiv 2510.14444: AdamW on the squared error of an attention or MLP block's output.
"""

from dataclasses import dataclass

import torch

from barber.errors import require_counts, require_positive, require_share
from barber.methods.block import BlockState
from barber.methods.patterns import Pattern
from barber.methods.rebuild.base import Needs, Rebuilt
from barber.methods.updates.base import held
from barber.runtime.tensors import batches


@dataclass(frozen=True)
class Reconstruct:
    """AdamW on the kept weights of all linears of a block together, from the weights as they are so far.

    The learning rate falls linearly to zero; there is no weight decay. Samples come in their order, so that every
    process takes the same steps.

    Args:
        learning_rate: of the first step; about what a weight changes by in it.
        batch_size: samples a step.
        epochs: how often all samples are gone through.
        follow: the share of the drift from the dense model's residual stream that the block's output is to make up for.
    """

    learning_rate: float = 1e-5
    batch_size: int = 2
    epochs: int = 1
    follow: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate")
        require_counts(self, "batch_size", "epochs")
        require_share(self, "follow")

    @property
    def needs(self) -> Needs:
        """The block; to follow, the dense model's stream."""
        return Needs(dense=self.follow > 0, trial=True)

    def check(self, pattern: Pattern) -> None:
        """Every pattern is allowed."""

    def rebuild(self, block: BlockState) -> dict[str, Rebuilt]:
        """New weights of all linears of the block."""
        trial = block.trial
        assert trial is not None
        weight_OI = {name: block.pruned[name].weight_OI.clone() for name in block.names}
        steps = [*batches(trial.num_samples, self.batch_size)] * self.epochs
        optimiser = torch.optim.AdamW(weight_OI.values(), lr=self.learning_rate, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / len(steps))
        for samples in steps:
            _, gradient_OI = trial.gradient(weight_OI, samples, self.follow)
            for name in block.names:
                # A weight whose gradient has always been zero does not move.
                weight_OI[name].grad = gradient_OI[name].masked_fill(block.pruned[name].mask_OI, 0)
            optimiser.step()
            schedule.step()
        return {name: held(block.pruned[name].mask_OI, weight_OI[name].detach()) for name in block.names}
