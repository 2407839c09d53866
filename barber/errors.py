"""What can go wrong, by whose fault it is; each error is one sentence that says what would be right."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from math import inf


class BarberError(Exception):
    """An error that the command line prints as one sentence, without a traceback."""

    exit_code = 1


class UserError(BarberError, ValueError):
    """A mistake in the configuration or the input data: what is wrong, where, and what would be right.

    `field` names the component's field at fault; the sentence begins with it and reads on ("must be ...").
    """

    exit_code = 2

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(f"{field} {message}" if field else message)
        self.message = message
        self.field = field


class DiskError(BarberError, OSError):
    """What a disk does not take: which file, and why. It is full, read-only or failing, or something is in the way."""


class NumericsError(BarberError):
    """NaN or infinite activations, losses or scores: the run stops, naming the layer and the linear."""


def in_one_line(error: BaseException) -> str:
    """What went wrong: our own sentence, or the first line of another library's, after the kind of its error."""
    if isinstance(error, BarberError):
        return str(error)
    said = str(error).strip().partition("\n")[0].rstrip()
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def first_sentence(error: BaseException) -> str:
    """What an error of another library says, without its advice, on one line; its name where it says nothing."""
    return re.split(r"\.(?: |$)", " ".join(str(error).split()), maxsplit=1)[0] or type(error).__name__


@contextmanager
def within(key: str) -> Iterator[None]:
    """Put a config key in front of the field that a UserError names: the component knows only its own fields.

    An error that names none is about the component as a whole: the key and a colon go before its sentence.
    """
    try:
        yield
    except UserError as error:
        field = f"{key}:" if error.field is None else f"{key}.{error.field}"
        raise UserError(error.message, field=field) from error


# What a run would never come to an end of, were it asked for more: rounds, tokens, samples.
_MOST = 1_000_000


def require_counts(component: object, *fields: str, least: int = 1, most: int | None = _MOST) -> None:
    """Refuse a component whose fields are not all from `least` to `most`, by the field's name; None is left alone."""
    for field in fields:
        value = getattr(component, field)
        if value is not None and value < least:
            raise UserError(f"must be at least {least}, not {value}", field=field)
        if value is not None and most is not None and value > most:
            raise UserError(f"must be at most {most}, not {value}", field=field)


def require_share(component: object, field: str) -> None:
    """Refuse a component whose field is not from 0 to 1."""
    if not 0 <= getattr(component, field) <= 1:
        raise UserError(f"must be from 0 to 1, not {getattr(component, field)}", field=field)


def require_not_negative(component: object, field: str) -> None:
    """Refuse a component whose field is below 0, infinite or no number."""
    if not 0 <= getattr(component, field) < inf:
        raise UserError(f"must be at least 0 and finite, not {getattr(component, field)}", field=field)


def require_positive(component: object, field: str) -> None:
    """Refuse a component whose field is not above 0, infinite or no number."""
    if not 0 < getattr(component, field) < inf:
        raise UserError(f"must be above 0 and finite, not {getattr(component, field)}", field=field)


def did_you_mean(
    name: str, known: list[str], prefix: str = "", below: Mapping[str, Sequence[str]] | None = None
) -> str:
    """What may have been meant, or all there is: the tail of a sentence.

    Args:
        below: keys that the known ones have below them, which are looked at where no known one is near.
    """
    close = get_close_matches(name, known, n=1)
    if not close:
        deeper = [(inner, f"{outer}.{inner}") for outer, inners in (below or {}).items() for inner in inners]
        near = get_close_matches(name, [inner for inner, _ in deeper], n=1)
        close = [path for inner, path in deeper if inner in near][:1]
    if close:
        return f", did you mean {prefix}{close[0]}?"
    return f"; there is {', '.join(prefix + other for other in known)}" if known else ""
