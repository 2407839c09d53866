"""Hydra's and OmegaConf's errors about the command line, in one sentence each."""

import re
from difflib import get_close_matches

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


def sentence(error: Exception) -> str:
    """What is wrong, the full key, and what would be right."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: no such choice; {group} can be {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: an override is KEY=VALUE or GROUP=CHOICE, without blanks around ="
    if isinstance(cause, OmegaConfBaseException):
        return _key_sentence(cause)
    if isinstance(error, OmegaConfBaseException):
        return _key_sentence(error)
    unknown_group = re.search(r"Could not override '([^'@]+)", str(error))
    if unknown_group:
        return f"{unknown_group[1]}: no such key or group; `barber --help` lists them"
    return " ".join(str(error).split())


def did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    """What may have been meant, or all there is: the tail of a sentence."""
    close = get_close_matches(name, known, n=1)
    if close:
        return f", did you mean {prefix}{close[0]}?"
    return f"; there is {', '.join(prefix + other for other in known)}" if known else ""


def _key_sentence(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key)
    parent = error.parent_node
    if isinstance(parent, DictConfig) and error.key is not None and str(error.key) not in parent:
        prefix = key.removesuffix(str(error.key))
        known = [str(name) for name in parent if name not in ("_target_", "hydra")]
        return f"{key}: no such key{did_you_mean(str(error.key), known, prefix)}"
    return f"{key}: {str(error).splitlines()[0]}"
