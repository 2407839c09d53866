"""Blocks as methods see them, made up."""

from collections.abc import Mapping
from typing import Any

from barber.methods.block import BlockState, Pruned
from barber.methods.patterns import Pattern
from barber.runtime.tensors import Tensor


def state(
    dense_OI: Mapping[str, Tensor], pattern: Pattern, pruned: Mapping[str, Pruned] | None = None, **known: Any
) -> BlockState:
    """A block where it is the turn of all linears, whose masks are of one pattern."""
    return BlockState(list(dense_OI), dense_OI, dict.fromkeys(dense_OI, pattern), pruned or {}, **known)
