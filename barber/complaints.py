"""Hydra's and OmegaConf's errors about the command line, in one sentence each."""

import re
from collections.abc import Sequence
from importlib.resources import files

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from barber.errors import did_you_mean


def sentence(error: Exception) -> str:
    """What is wrong, the full key, and what would be right."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return _choice_sentence(group, choice, error.options)
    if isinstance(error, OverrideParseException):
        form = "an override is KEY=VALUE or GROUP=CHOICE, without blanks around ="
        return f"cannot read {error.override!r}: {form}; a value with special characters needs quotes: \"KEY='VALUE'\""
    if isinstance(cause, OmegaConfBaseException):
        return _key_sentence(cause)
    if isinstance(error, OmegaConfBaseException):
        return _key_sentence(error)
    text = " ".join(str(error).split())
    if one_of_a_list := re.search(r"Could not load '([^']+)/([^'/]+)'", text):
        group, choice = one_of_a_list.groups()
        return _choice_sentence(group, choice, _choices(group))
    if unknown_group := re.search(r"Could not override '([^'@]+)", text):
        return f"{unknown_group[1]}: no such key or group; `barber --help` lists them"
    if several := re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'(?= 1\.)", text):
        key, values = several.groups()
        return f"{key}={values}: a sweep over several values needs -m; a comma in a value, quotes: \"{key}='{values}'\""
    return text


def nameless_choice(arguments: Sequence[str]) -> str | None:
    """The sentence about GROUP=null or GROUP=3, of which Hydra says only that it is no text."""
    for argument in arguments:
        group, _, choice = argument.partition("=")
        known = _choices(group)
        if known and choice not in known:
            return _choice_sentence(group, choice, known)
    return None


def _choice_sentence(group: str, choice: str, known: Sequence[str]) -> str:
    return f"{group}={choice}: no such choice; {group} can be {', '.join(known)}"


def _choices(group: str) -> list[str]:
    folder = files("barber.conf").joinpath(group)
    if not group or not folder.is_dir():
        return []
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _key_sentence(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key)
    parent = error.parent_node
    if isinstance(parent, DictConfig) and error.key is not None and str(error.key) not in parent:
        prefix = key.removesuffix(str(error.key))
        known = [str(name) for name in parent if name not in ("_target_", "hydra")]
        if not known:
            return f"{key}: no such key; {prefix.rstrip('.')} has none as it is chosen here"
        nodes = {name: parent._get_node(name) for name in known}
        below = {
            name: [str(inner) for inner in node if inner != "_target_"]
            for name, node in nodes.items()
            if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation()
        }
        return f"{key}: no such key{did_you_mean(str(error.key), known, prefix, below)}"
    return f"{key}: {str(error).splitlines()[0]}"
