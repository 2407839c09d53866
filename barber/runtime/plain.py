"""Dataclasses as what JSON has, and back: the fields are the keys."""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from barber.errors import UserError

T = TypeVar("T")

FLAT = {"flat": True}
"""Metadata of a field whose own keys lie beside the others; a mapping's are all that the others leave."""

_NAMES = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", dict: "an object"}


def plain(value: Any) -> Any:
    """A value as JSON has it; of a dataclass, fields that hold their default are left out."""
    if is_dataclass(value):
        found: dict[str, Any] = {}
        for field in fields(value):
            inner = getattr(value, field.name)
            if inner != _default(field):
                found |= plain(inner) if field.metadata == FLAT else {key_of(field): plain(inner)}
        return found
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def typed(kind: type[T], value: Any, key: str = "") -> T:
    """The inverse of `plain`; keys that no field has are passed over.

    Args:
        kind: dataclasses, float, int, str, bool, Literal, Any, and lists, tuples, dicts and unions of them.
        key: where the value stands, for errors.

    Raises:
        UserError: a key is missing or has a value of another kind, or a number is NaN or infinite.
    """
    made: T = _typed(kind, value, key)
    return made


def key_of(field: Field[Any]) -> str:
    """The key of a field: its name, but for the underscore that parts it from a word of Python's."""
    return field.name.rstrip("_")


def _typed(kind: Any, value: Any, key: str) -> Any:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(inner, value, key)
    if is_dataclass(kind):
        return _instance(kind, _checked(dict, value, key), key)
    if origin is dict:
        return {name: _typed(inner[1], one, _below(key, name)) for name, one in _checked(dict, value, key).items()}
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise UserError(f"must be a list, not {shortened(value)}", key)
        return origin(_typed(inner[0], one, f"{key}[{number}]") for number, one in enumerate(value))
    if origin is Literal:
        if value not in inner:
            raise UserError(f"must be one of {', '.join(map(str, inner))}, not {shortened(value)}", key)
        return value
    return _checked(kind, value, key)


def _instance(kind: Any, value: dict[str, Any], key: str) -> Any:
    own = {key_of(field) for field in fields(kind) if field.metadata != FLAT}
    found = {}
    for field in fields(kind):
        if field.metadata == FLAT:
            mapping = not is_dataclass(field.type)
            beside = {name: one for name, one in value.items() if name not in own} if mapping else value
            found[field.name] = _typed(field.type, beside, key)
        elif key_of(field) in value:
            found[field.name] = _typed(field.type, value[key_of(field)], _below(key, key_of(field)))
        elif _default(field) is MISSING:
            raise UserError("is missing", _below(key, key_of(field)))
    return kind(**found)


def _one_of(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not NoneType]
    for kind in others:
        try:
            return _typed(kind, value, key)
        except UserError:
            continue
    return _typed(last, value, key)


def _checked(kind: Any, value: Any, key: str) -> Any:
    """A value of JSON's own kinds; an int will do for a float."""
    fits = kind is Any or type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and not abs(value) <= sys.float_info.max):  # which NaN is not, either
        raise UserError(f"must be {_NAMES[kind]}, not {shortened(value)}", key)
    return value


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
