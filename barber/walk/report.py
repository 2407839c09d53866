"""What pruning did to a model, in figures."""

from dataclasses import dataclass, field

from barber.walk.walk import BlockResult


@dataclass(frozen=True)
class BlockReport:
    """One block in figures: what a line of layers.jsonl holds.

    Args:
        linears: the counts of each: weights, zeros at the end, of the dense model and with the initial mask, exchanges.
        by_step: pairs that each step of the rebuilding exchanged.
    """

    layer: int
    block: str
    sparsity: float
    exchanges: int
    loss_before: float | None
    loss_after: float | None
    seconds: float
    linears: dict[str, dict[str, int]]
    by_step: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, result: BlockResult) -> "BlockReport":
        """The figures of a block that is done."""
        counts = {
            linear.name: {
                "weights": linear.final.weight_OI.numel(),
                "zeros": linear.zeros,
                "exchanges": linear.num_exchanged,
                "dense_zeros": linear.dense_zeros,
                "pruned_zeros": linear.pruned_zeros,
            }
            for linear in result.linears
        }
        zeros, weights = (sum(count[key] for count in counts.values()) for key in ("zeros", "weights"))
        return cls(
            layer=result.layer,
            block=result.block,
            sparsity=zeros / weights,
            exchanges=sum(count["exchanges"] for count in counts.values()),
            loss_before=result.loss_before,
            loss_after=result.loss_after,
            seconds=round(result.seconds, 3),
            linears=counts,
            by_step=result.by_step,
        )


@dataclass
class Report:
    """What pruning did to a model.

    Args:
        blocks: the blocks, in the order of the walk.
        seconds: time by phase of the walk.
        initial_seconds: the part of it that computing the initial masks took, where they were not known.
        num_resumed: layers that were finished already.
    """

    blocks: list[BlockReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    initial_seconds: float = 0.0
    num_resumed: int = 0

    @property
    def linears(self) -> dict[str, dict[str, int]]:
        """Of every linear: its weights, the exact zeros among them, now and before, the pairs exchanged."""
        return {name: counts for block in self.blocks for name, counts in block.linears.items()}

    @property
    def weights(self) -> int:
        """Weights of all pruned linears."""
        return sum(counts["weights"] for counts in self.linears.values())

    @property
    def zeros(self) -> int:
        """Exact zeros among them."""
        return sum(counts["zeros"] for counts in self.linears.values())

    @property
    def exchanges(self) -> int:
        """Pairs of weights that the rebuilding exchanged."""
        return sum(block.exchanges for block in self.blocks)

    @property
    def by_step(self) -> list[int]:
        """The same by step of the rebuilding; empty: it has none, or they were not counted."""
        # of layers that an earlier version finished nothing is known, and then nothing of the walk
        return [sum(counts) for counts in zip(*(block.by_step for block in self.blocks), strict=False)]

    @property
    def sparsity(self) -> float:
        """The share of exact zeros in all pruned linears."""
        return self.zeros / self.weights
