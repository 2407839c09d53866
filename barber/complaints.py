"""What Hydra, OmegaConf, the YAML reader and the system have against a command, in one sentence each."""

import re
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from barber.errors import did_you_mean, in_one_line
from barber.habits import FORM, QUOTES, choices

_QUOTES = "\"'"
# What the extra `sweeps` brings, and what is made of it here.
_OF_SWEEPS = ("joblib", "optuna", "slurm", "submitit_local", "submitit_slurm")
_LISTED = {"model": "barber ls models", "method": "barber ls methods", "experiment": "barber ls experiments"}
# Choices of a group that a sentence names.
_SHOWN = 8


def sentence(error: Exception, arguments: Sequence[str]) -> str:
    """What is wrong, the full key, and what would be right.

    Args:
        error: of Hydra, OmegaConf or the YAML reader.
        arguments: the command line that it is about.
    """
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name.strip(_QUOTES)}, line {mark.line + 1}: {error.problem}; a config file is plain YAML"
    if isinstance(error, ValueError) and "Config group override" in str(error):  # Hydra's, about GROUP=null
        return _nameless_choice(arguments) or str(error)
    if isinstance(error, ValueError) and "Unsupported item value in defaults" in str(error):
        return "a choice in a config's defaults must be a text: YAML reads 2:4 as the number 124, say 2of4"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return f"the command cannot be composed: {in_one_line(error)}"
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return _choice_sentence(group, choice, error.options)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {FORM}; {QUOTES}"
    if isinstance(cause, OmegaConfBaseException):
        return _key_sentence(cause)
    if isinstance(error, OmegaConfBaseException):
        return _key_sentence(error)
    text = " ".join(str(error).split())
    if one_of_a_list := re.search(r"Could not load '([^']+)/([^'/]+)'", text):
        group, choice = one_of_a_list.groups()
        return _choice_sentence(group, choice, choices(group))
    if unknown_group := re.search(r"Could not override '([^'@]+)", text):
        return f"{unknown_group[1]}: no such key or group; `barber --help` lists them"
    if several := re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'(?= 1\.)", text):
        key, values = several.groups()
        return f"{key}={values}: a sweep over several values needs -m; a comma in a value, quotes: \"{key}='{values}'\""
    return text


def _nameless_choice(arguments: Sequence[str]) -> str | None:
    """The sentence about GROUP=null or GROUP=3, of which Hydra says only that it is no text."""
    for argument in arguments:
        group, _, choice = argument.lstrip("+~").partition("=")
        if (known := choices(group)) and choice not in known and not choice.startswith("["):
            return _choice_sentence(group, choice, known)
    return None


def _choice_sentence(group: str, choice: str, known: Sequence[str]) -> str:
    if group in ("hydra/launcher", "hydra/sweeper") and choice in _OF_SWEEPS:
        return f'{group}={choice} needs the extra: pip install "llm-barber[sweeps]"'
    lower = {name.lower(): name for name in known}
    near = [lower[name] for name in get_close_matches(choice.lower(), lower, n=_SHOWN)]
    shown = sorted(known, key=lambda name: near.index(name) if name in near else len(near))[:_SHOWN]
    others = (
        f" and {len(known) - len(shown)} others ({_LISTED.get(group, 'barber --help')} lists them)"
        if len(known) > len(shown)
        else ""
    )
    meant = f", did you mean {group}={near[0]}?" if near else ";"
    return f"{group}={choice}: no such choice{meant} {group} can be {', '.join(shown)}{others}"


def _key_sentence(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key)
    parent = error.parent_node
    if isinstance(parent, DictConfig) and error.key is not None and str(error.key) not in parent:
        prefix = key.removesuffix(str(error.key))
        known = [str(name) for name in parent if name not in ("_target_", "hydra")]
        if key == "model.path":
            return "model.path goes with a folder, model=local model.path=FOLDER, or the hub, model=hub model.path=NAME"
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


def about(error: OSError) -> str:
    """An error of the system's, with the file that it is about, or else the folder."""
    where = error.filename
    with suppress(Exception):  # there may be no folder yet
        where = where or HydraConfig.get().run.dir
    reason = error.strerror or str(error).partition("\n")[0]
    return f"{where}: {reason}" if where else reason


def interrupted(is_sweep: bool) -> str:
    """What an interruption leaves to the same command."""
    from barber.run.claim import holds_layers

    goes_on = "begins anew"
    with suppress(Exception):  # there may be no folder yet
        if is_sweep:
            goes_on = "goes on with the jobs that are left"
        elif holds_layers(Path(HydraConfig.get().run.dir)):
            goes_on = "goes on after the layers that are done"
    return f"interrupted; the same command {goes_on}"
