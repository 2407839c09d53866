"""Sparsity patterns: which weights of a linear compete for staying, and how many of them go."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from barber.errors import UserError, require_counts
from barber.methods import masks
from barber.runtime.tensors import Tensor

Granularity = Literal["output", "input", "layer", "block"]


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go; `sparsity` is the share that does.

    Args:
        sparsity: share of the weights to prune, at least 0 and below 1.
    """

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UserError(f"must be at least 0 and below 1, not {self.sparsity}", field="sparsity")

    def __str__(self) -> str:
        return f"{self.sparsity:.0%} unstructured"

    def of_columns(self, start: int, stop: int, width: int) -> "Unstructured":
        """The pattern of columns `start` to `stop` of a linear of `width` inputs, chosen by themselves."""
        return self

    def prune_rows(self, score_OI: Tensor) -> Tensor:
        """The mask that prunes the int(I * sparsity) lowest scores of every output row."""
        return masks.lowest(score_OI, int(score_OI.shape[1] * self.sparsity))

    def prune_whole(self, score_OI: Tensor) -> Tensor:
        """The mask that prunes the int(numel * sparsity) + 1 lowest scores of the whole matrix; none where it is 0.

        Published code prunes what is not above the score at index int(numel * sparsity) of the ascending sort: one more
        than the share, and all that ties with it besides, which of weights in few bits are many. Here ties are left.
        """
        count = int(score_OI.numel() * self.sparsity) + 1 if self.sparsity else 0
        return masks.lowest(score_OI.reshape(1, -1), count).view_as(score_OI)


@dataclass(frozen=True)
class NM:
    """`n` weights are kept of every `m` consecutive inputs of an output row (2:4, 4:8).

    Args:
        n: weights kept in a cell, at least 1.
        m: weights of a cell, more than n; it has to divide the inputs of every linear.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        require_counts(self, "n", "m")
        if self.n >= self.m:
            raise UserError(f"must be below m ({self.m}), not {self.n}", field="n")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The share of the weights that is pruned."""
        return 1 - self.n / self.m

    def of_columns(self, start: int, stop: int, width: int) -> "NM":
        """The pattern of columns `start` to `stop` of a linear of `width` inputs, chosen by themselves."""
        return self

    def prune_rows(self, score_OI: Tensor) -> Tensor:
        """The mask that prunes the m - n lowest scores of every cell."""
        return masks.lowest(score_OI.reshape(-1, self.m), self.m - self.n).view_as(score_OI)

    prune_whole = prune_rows


@dataclass(frozen=True)
class Exactly:
    """Any `num_pruned` weights of one linear go: what an allocation gives it.

    Args:
        num_pruned: at least 0 and at most as many as the linear has.
    """

    num_pruned: int

    def __post_init__(self) -> None:
        require_counts(self, "num_pruned", least=0, most=None)

    def __str__(self) -> str:
        return f"{self.num_pruned} weights"

    def of_columns(self, start: int, stop: int, width: int) -> "Exactly":
        """The pattern of columns `start` to `stop` of a linear of `width` inputs, chosen by themselves.

        They lose their share, and columns that make up the linear lose `num_pruned` together.
        """
        return Exactly(self.num_pruned * stop // width - self.num_pruned * start // width)

    def prune_rows(self, score_OI: Tensor) -> Tensor:
        """The mask that prunes num_pruned // O lowest scores of every output row.

        The num_pruned % O rows whose next score is lowest lose it, too.
        """
        return masks.lowest_evenly(score_OI, self.num_pruned)

    def prune_whole(self, score_OI: Tensor) -> Tensor:
        """The mask that prunes the lowest scores of the whole matrix."""
        return masks.lowest(score_OI.reshape(1, -1), self.num_pruned).view_as(score_OI)


Pattern = Unstructured | NM | Exactly


def for_each(pattern: Pattern | Mapping[str, Pattern], names: Iterable[str]) -> Mapping[str, Pattern]:
    """One pattern as that of each of some linears; patterns by linear as they are."""
    return pattern if isinstance(pattern, Mapping) else dict.fromkeys(names, pattern)


def by_linear(
    pattern: Pattern | Mapping[str, Pattern], names: Sequence[str], left_out: Collection[str] = ()
) -> dict[str, Pattern]:
    """The pattern of every linear, given one for all of them or one for each; of those that are left out, none.

    Raises:
        UserError: a linear has none, or there is one for what is no linear of the model.
    """
    wanted = [name for name in names if name not in left_out]
    known, found = set(names), for_each(pattern, wanted)
    if unknown := next((str(name) for name in found if name not in known), None):
        close = get_close_matches(unknown, names, n=1)
        tail = f", did you mean {close[0]}?" if close else f", and they are called like {names[0]}"
        raise UserError(f"must name linears of the model, but has one for {unknown}{tail}", field="pattern")
    if missing := next((name for name in wanted if name not in found), None):
        raise UserError(
            f"must name every linear of the model, as barber.allocate does, but has none for {missing}", field="pattern"
        )
    return {name: found[name] for name in wanted}
