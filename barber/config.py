"""From the composed config to an Experiment: every value is checked before anything loads.

A node with a `_target_` names a dataclass or a function; its other keys are the arguments. Config objects stop here:
the rest of the package never sees them.
"""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import barber
from barber.errors import UserError, did_you_mean, within
from barber.run.experiment import Experiment
from barber.targets import KEY, is_allowed, is_ours


def resolved(config: DictConfig) -> dict[str, Any]:
    """The config as plain values.

    Raises:
        UserError: a value that has to be given is missing, or an interpolation leads nowhere.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has to be given: {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def experiment(config: Mapping[str, Any]) -> Experiment:
    """Build an experiment from a resolved config.

    Raises:
        UserError: a value of the wrong type or out of range, by its full key.
    """
    # others take these
    values = {key: value for key, value in config.items() if key not in ("metric", "data_dir", "bos", "objective", KEY)}
    allowed = config.get(KEY) or []
    # components take over some of them (${seed}): a mistake is told by the key that it was made in
    _check_numbers(values, "")
    _check(Experiment, {key: value for key, value in values.items() if not isinstance(value, dict)}, "")
    built = _call(Experiment, {key: build(value, key, allowed) for key, value in values.items()}, "")
    assert isinstance(built, Experiment)
    return built


def refuse_merged(overrides: Sequence[str], values: Mapping[str, Any]) -> None:
    """Refuse several choices that are one and the same step: Hydra would make one of them, without a word.

    Raises:
        UserError: a list of steps names one twice, or `none` beside others.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for group, chosen in {one.key_or_group: one.value() for one in parsed}.items():  # the last one counts
        if group in ("rebuild", "update") and isinstance(chosen, list) and len(chosen) != len(values.get(group) or {}):
            names = ",".join(map(str, chosen))
            raise UserError(f"{group}=[{names}] must name every step once, and none only by itself")


def _check_numbers(node: Any, key: str) -> None:
    """Refuse what no field means: numbers that are none, and whole ones that no 64 bits hold."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for name, value in items:
            below = f"{key}[{name}]" if isinstance(node, list) else f"{key}.{name}" if key else str(name)
            _check_numbers(value, below)
    elif isinstance(node, float) and not isfinite(node):
        raise UserError(f"{key} must be a finite number, not {node}")
    elif isinstance(node, int) and not -(2**63) <= node < 2**63:
        raise UserError(f"{key} must be a number of 64 bits, from {-(2**63)} to {2**63 - 1}")


def build(node: Any, key: str, allowed: Sequence[str] = ()) -> Any:
    """Build what a config node describes: plain values as they are, a `_target_` by calling it.

    Args:
        allowed: names that may be called beside our own, as `allow_targets` has them.
    """
    if isinstance(node, list):
        return [build(item, f"{key}[{i}]", allowed) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    arguments = {name: build(value, f"{key}.{name}", allowed) for name, value in node.items() if name != "_target_"}
    if "_target_" not in node:
        return arguments
    return _call(_find(str(node["_target_"]), key, allowed), arguments, key)


# Public names that differ from the last part of the internal path that YAML named before there were public ones.
_RENAMED = {
    "barber.allocation.Error": "ErrorCurves",
    "barber.calibration.hub": "hub_windows",
    "barber.calibration.offline": "offline_windows",
    "barber.calibration.text": "text_windows",
}


def _find(target: str, key: str, allowed: Sequence[str]) -> Any:
    module, _, name = target.rpartition(".")
    if not is_ours(target) and not is_allowed(target, allowed):
        package = module.partition(".")[0]
        public = _RENAMED.get(target, name)
        near = f"use barber.{public}" if public in barber.__all__ else "see barber.__all__"
        trust = f"if you trust {package}, say '{KEY}=[{package}.*]' on the command line"
        tail = near if package in ("", "barber") else trust
        raise UserError(f"{key}._target_ must be a public name of barber, {target} is none; {tail}")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}._target_ must name a class or function, and {target!r} is none ({error})") from error


def _call(target: Any, arguments: dict[str, Any], key: str) -> Any:
    prefix = f"{key}." if key else ""
    _check(target, arguments, prefix)
    known = inspect.signature(target).parameters
    missing = [name for name, p in known.items() if p.default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise UserError(f"{prefix}{missing[0]} has to be given: {prefix}{missing[0]}=VALUE")
    if not key:
        return target(**arguments)
    with within(key):
        return target(**arguments)


def _check(target: Any, arguments: dict[str, Any], prefix: str) -> None:
    known = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in arguments.items():
        if name not in known:
            raise UserError(f"{prefix}{name}: no such key{did_you_mean(name, list(known), prefix)}")
        hint = hints.get(name, Any)
        expected = _mismatch(value, hint)
        if expected and (stray := _stray(value, hint, f"{prefix}{name}")):
            raise UserError(stray)
        if expected and name == "pattern" and isinstance(value, int):
            n, m = divmod(value, 60)
            raise UserError(f"pattern must be a choice, as {n}of{m}; YAML reads {n}:{m} as the number {value}")
        if expected:
            raise UserError(f"{prefix}{name} must be {expected}, not {value!r}")


def _stray(value: Any, hint: Any, key: str) -> str | None:
    """The sentence about the options of a component that is not chosen, or about a name that is none."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    item_hint = next((get_args(option)[1] for option in options if get_origin(option) is Mapping), None)
    if not isinstance(value, dict) or item_hint in _PLAIN:
        return None
    if item_hint is None:
        takes_component = any(inspect.isclass(option) and option not in (*_PLAIN, NoneType) for option in options)
        return _unchosen(key, value) if value and takes_component else None
    wrong = [name for name, item in value.items() if _mismatch(item, item_hint)]
    if not wrong:
        return None
    name, known = wrong[0], [other for other in value if other not in wrong]
    if isinstance(value[name], dict) and value[name]:
        return _unchosen(f"{key}.{name}", value[name])
    below = {other: list(inspect.signature(type(value[other])).parameters) for other in known}
    return f"{key}.{name}: no such key{did_you_mean(name, known, f'{key}.', below)}"


def _unchosen(key: str, value: dict[str, Any]) -> str:
    return f"{key}.{next(iter(value))} is given, but {key} is not chosen; choose it as well, or leave that out"


def _mismatch(value: Any, hint: Any) -> str | None:
    """What a value should be, in words, if it is not that; None if it is."""
    if get_origin(hint) in (Union, UnionType):
        options = [_mismatch(value, option) for option in get_args(hint)]
        return None if None in options else " or ".join(dict.fromkeys(str(option) for option in options))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        one_of = "one of " if len(choices) > 1 else ""
        return None if value in choices else one_of + ", ".join(map(str, choices))
    if hint is NoneType:
        return None if value is None else "null"
    if get_origin(hint) is Sequence:
        if not isinstance(value, list):
            return "a list"
        found = [_mismatch(item, get_args(hint)[0]) for item in value]
        wrong = next((words for words in found if words), None)
        if wrong and wrong.startswith("one of "):
            return f"a list of {wrong.removeprefix('one of ')}"
        return f"a list whose every item is {wrong}" if wrong else None
    if hint is Any:
        return None
    if hint not in _PLAIN:  # a mapping, or a component, whose building has been checked
        if get_origin(hint) is Mapping:
            if not isinstance(value, dict):
                return "a mapping of keys to values"
            found = [_mismatch(item, get_args(hint)[1]) for item in value.values()]
            wrong = next((words for words in found if words), None)
            return f"a mapping whose every value is {wrong}" if wrong else None
        plain = value is None or isinstance(value, bool | int | float | str | list | dict)
        return "a component, as GROUP=CHOICE gives" if plain else None
    types, words = _PLAIN[hint]
    return None if isinstance(value, types) and (hint is bool or not isinstance(value, bool)) else words


_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}
