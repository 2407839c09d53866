"""Leaving out: which linears of a model stay dense, and what is left of the pattern."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from transformers import PreTrainedModel

from barber.errors import UserError
from barber.methods.patterns import Pattern, by_linear
from barber.model.blocks import Layer
from barber.model.decoder import Decoder

_FORMS = "layers (3 or '0-3'), names of linears ('*.down_proj') and regular expressions ('re:.*[kv]_proj')"


def skipped(skip: Sequence[int | str], model: PreTrainedModel) -> frozenset[str]:
    """The full names of the linears that are left out; a model on the meta device will do.

    Args:
        skip: numbers and ranges of layers, `re:` and a regular expression that has to match a full name, or else names
            with `*`, `?` and `[...]` as in file names.

    Raises:
        UserError: an entry that means nothing or matches nothing, or nothing is left to prune.
    """
    if isinstance(skip, str) or not isinstance(skip, Sequence):
        raise UserError(f"must be a list of {_FORMS}, not {skip!r}", field="skip")
    layers = Decoder(model).layers
    names = [linear.name for layer in layers for linear in layer.linears]
    found = frozenset(name for entry in skip for name in _matched(entry, layers, names))
    if found and len(found) == len(names):
        raise UserError("must leave something to prune, but all linears of the model are left out", field="skip")
    return found


def of_the_rest(
    pattern: Pattern | Mapping[str, Pattern], model: PreTrainedModel, left_out: frozenset[str]
) -> Pattern | Mapping[str, Pattern]:
    """The pattern, of all linears or by name; where linears are left out, by name of the others.

    Raises:
        UserError: see `by_linear`.
    """
    if not left_out:
        return pattern
    return by_linear(pattern, [linear.name for linear in Decoder(model).linears], left_out)


def _matched(entry: object, layers: Sequence[Layer], names: Sequence[str]) -> Iterator[str]:
    """The linears that an entry is about, at least one."""
    if isinstance(entry, bool) or not isinstance(entry, int | str):
        raise UserError(f"must have {_FORMS}, not {entry!r}", field="skip")
    if span := re.fullmatch(r"(-?\d+)(?:\s*-\s*(\d+))?", str(entry).strip()):
        first = int(span[1])
        last = first if span[2] is None else int(span[2])
        if not 0 <= first <= last < len(layers):
            raise UserError(f"has {entry}, but the model has the layers 0 to {len(layers) - 1}", field="skip")
        return (linear.name for layer in layers[first : last + 1] for linear in layer.linears)
    text = str(entry)
    matched = _by_expression(text, names) if text.startswith("re:") else _by_name(text, names)
    if not matched:
        near = _meant(text, names)
        tail = f", did you mean {near}?" if near else f"; they are called like {names[0]}"
        raise UserError(f"has {text!r}, which matches no linear of the model's layers{tail}", field="skip")
    return iter(matched)


def _by_name(pattern: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


def _by_expression(entry: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if _expression(entry).fullmatch(name)]


def _expression(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix("re:"))
    except re.error as error:
        raise UserError(f"has {entry!r}, which is no regular expression: {error}", field="skip") from error


def _meant(entry: str, names: Sequence[str]) -> str | None:
    """What an entry that matches nothing may have been meant to be."""
    if entry.startswith("re:"):
        inside = f"re:.*{entry.removeprefix('re:')}.*"
        return inside if _by_expression(inside, names) else None
    for wider in (f"*.{entry}", f"{entry}.*", f"*.{entry}.*"):
        if _by_name(wider, names):
            return wider
    head, _, tail = entry.rpartition(".")
    last_parts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    nearer = [f"{head or '*'}.{part}" for part in get_close_matches(tail, last_parts, n=1)]
    return next((one for one in nearer if _by_name(one, names)), None) or next(
        iter(get_close_matches(entry, names, n=1)), None
    )
