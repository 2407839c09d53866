"""Random pruning: what any other method has to be better than. It needs no data."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import torch

from barber.methods.block import BlockState, Pruned
from barber.methods.pruners.base import GradientOf
from barber.methods.statistics import InputStatistic
from barber.runtime.tensors import Tensor, as_bytes


@dataclass(frozen=True)
class Random:
    """Random scores, uniformly distributed and compared in every output row, or in N:M cells.

    They follow from the seed and the linear's dense weight: every linear has others, and the same ones wherever and in
    whatever order linears are pruned. Only linears whose weights are equal bit by bit are pruned alike.

    Args:
        seed: of the scores.
    """

    seed: int = 0

    statistic: ClassVar[type[InputStatistic] | None] = None
    gradient: ClassVar[GradientOf] = None
    updates: ClassVar[bool] = False

    def prune(self, block: BlockState) -> dict[str, Pruned]:
        """The lowest scores go, row by row."""
        pruned = {}
        for name in block.names:
            score_OI = self._score(block.dense_OI[name])
            pruned[name] = Pruned.masking(block.dense_OI[name], block.patterns[name].prune_rows(score_OI))
        return pruned

    def _score(self, weight_OI: Tensor) -> Tensor:
        digest = blake2b(repr((self.seed, tuple(weight_OI.shape))).encode(), digest_size=8)
        digest.update(as_bytes(weight_OI.cpu().contiguous()))
        # Drawn on the CPU: a GPU's generator gives other numbers.
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))
        return torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)
