"""What pruning did to a model, in figures."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from barber.walk.walk import BlockResult


@dataclass(frozen=True)
class BlockReport:
    """One block in figures: what a line of layers.jsonl holds; linears that were left out apart from the others.

    Args:
        linears: the counts of each: weights, zeros at the end, of the dense model and with the initial mask, exchanges.
        by_step: pairs that each step of the rebuilding exchanged.
        left_out: the counts of those that were.
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
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, result: BlockResult) -> "BlockReport":
        """The figures of a block that is done."""
        every = {
            linear.name: {
                "weights": linear.final.weight_OI.numel(),
                "zeros": linear.zeros,
                "exchanges": linear.num_exchanged,
                "dense_zeros": linear.dense_zeros,
                "pruned_zeros": linear.pruned_zeros,
            }
            for linear in result.linears
        }
        is_pruned = {linear.name: linear.is_pruned for linear in result.linears}
        counts = {name: count for name, count in every.items() if is_pruned[name]}
        zeros, weights = (sum(count[key] for count in counts.values()) for key in ("zeros", "weights"))
        return cls(
            layer=result.layer,
            block=result.block,
            sparsity=zeros / weights if weights else 0.0,
            exchanges=sum(count["exchanges"] for count in counts.values()),
            loss_before=result.loss_before,
            loss_after=result.loss_after,
            seconds=round(result.seconds, 3),
            linears=counts,
            by_step=result.by_step,
            left_out={name: count for name, count in every.items() if not is_pruned[name]},
        )


@dataclass(repr=False)
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
    def left_out(self) -> dict[str, dict[str, int]]:
        """Linears that were left out and are dense."""
        return {name: counts for block in self.blocks for name, counts in block.left_out.items()}

    @property
    def overall_sparsity(self) -> float:
        """The share of exact zeros in all linears of the decoder layers, those that were left out among them."""
        every = [*self.linears.values(), *self.left_out.values()]
        return sum(counts["zeros"] for counts in every) / sum(counts["weights"] for counts in every)

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

    def __repr__(self) -> str:
        """A few lines, for people."""
        return "\n".join(f"{what:<12} {found}" for what, found in self._figures())

    def _repr_html_(self) -> str:
        """The same, as a notebook shows it."""
        rows = (f"<tr><th>{escape(what)}</th><td>{escape(found)}</td></tr>" for what, found in self._figures())
        return f"<table>{''.join(rows)}</table>"

    def _figures(self) -> Iterator[tuple[str, str]]:
        blocks = [block for block in self.blocks if block.linears]
        layers = len({block.layer for block in blocks})
        yield "pruned", f"{len(self.linears)} linears in {len(blocks)} blocks of {layers} layers"
        if self.weights:
            yield "zeros", f"{self.sparsity:.2%}, {self.zeros:,} of {self.weights:,} weights"
        if self.left_out:
            yield "left out", f"{len(self.left_out)} linears; zeros of all together {self.overall_sparsity:.2%}"
        if losses := [
            (block.loss_before, block.loss_after)
            for block in blocks
            if block.loss_before is not None and block.loss_after is not None
        ]:
            lower = sum(after < before for before, after in losses)
            yield "exchanged", f"{self.exchanges:,} pairs of weights"
            yield "block error", f"lower in {lower} of {len(losses)} blocks than with the initial masks"
        yield "time", f"{sum(self.seconds.values()):.1f} s"
