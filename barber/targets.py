"""What a config may have called: names of ours and of Hydra's, and what the user allows on the command line.

A config file may be somebody else's, and a name in it is code that runs: a component, a callback, a logging handler, a
sweeper. Every such name is looked at before anything is imported by it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import barber
from barber.errors import UserError

# Whole names: Hydra follows the attributes of a module, so that a module would allow all that it has imported.
_CALLBACKS = {
    "barber.cli.KeepFinishedRuns",
    "hydra.experimental.callbacks.LogJobReturnCallback",
    "hydra.experimental.callbacks.PickleJobInfoCallback",
}
_PLUGINS = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    *(
        f"optuna.samplers.{sampler}Sampler"
        for sampler in ("CmaEs", "Grid", "MOTPE", "NSGAII", "NSGAIII", "PartialFixed", "QMC", "Random", "TPE")
    ),
}
_LOGGING = {
    "barber.run.display.ConsoleHandler",
    "barber.run.display.LogFile",
    "ext://sys.stderr",
    "ext://sys.stdout",
    "logging.FileHandler",
    "logging.Formatter",
    "logging.NullHandler",
    "logging.StreamHandler",
}
_OF_HYDRA = _CALLBACKS | _PLUGINS | _LOGGING
# The keys by which Hydra and the plugins call something, and those by which Python's logging does, beside `ext://`.
_CALLED = {"_target_", "custom_search_space"}
_CALLED_BY_LOGGING = _CALLED | {"()", "class", "factory", "listener", "queue"}

KEY = "allow_targets"


def is_allowed(target: str, allowed: Sequence[str]) -> bool:
    """Whether the user allows a name that is not ours: `package.module.name` or `package.*`."""
    return any(fnmatchcase(target, pattern) for pattern in allowed)


def is_ours(target: str) -> bool:
    """Whether it is a public name of barber."""
    return target.removeprefix("barber.") in barber.__all__ and target.startswith("barber.")


def hold_hydra() -> None:
    """Have every config checked as it is composed: Hydra has no place between that and calling what it names."""
    load: Callable[..., DictConfig] = ConfigLoaderImpl.load_configuration

    @wraps(load)
    def checked(self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *rest: Any, **more: Any) -> Any:
        config = load(self, config_name, overrides, *rest, **more)
        try:
            check(config, overrides)
        except UserError as error:
            raise HydraException(str(error)) from error
        return config

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]


def check(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse what Hydra would call of somebody's choosing.

    Args:
        config: as composed, with Hydra's own part.
        overrides: of the command line.

    Raises:
        UserError: a name that is neither Hydra's nor allowed, or an allowance that stands in a file.
    """
    allowed = _allowance(config, overrides)
    for key, name in _named(config.hydra, "hydra", _CALLED):
        if name not in _OF_HYDRA and not is_allowed(name, allowed):
            raise UserError(
                f"{key} must be of Hydra, of the launchers and sweepers that Barber comes with, or allowed on the "
                f"command line ('{KEY}=[{name.removeprefix('ext://')}]'); {name} is none of them"
            )


def _allowance(config: DictConfig, overrides: Sequence[str]) -> list[str]:
    """The names that the command line allows: a file that could allow itself something would allow itself all."""
    allowed = config.get(KEY)
    said = any(one.key_or_group == KEY for one in OverridesParser.create().parse_overrides(list(overrides)))
    swept = [key for key in config.hydra.sweeper.get("params") or {} if str(key).lstrip("+~").startswith(KEY)]
    if swept or (allowed and not said):
        where = f"hydra.sweeper.params.{swept[0]}" if swept else KEY
        raise UserError(f"{where} must not stand in a config file; what you trust, allow on the command line")
    names = OmegaConf.to_container(allowed) if isinstance(allowed, ListConfig) else allowed
    if allowed is None:  # a config of another origin
        return []
    if not isinstance(names, list) or not all(re.fullmatch(r"\w+(\.\w+)*(\.\*)?", str(name)) for name in names):
        raise UserError(f"{KEY} must be a list of names as package.module.Name or package.*, not {names!r}")
    return list(map(str, names))


def _named(node: Any, key: str, called: set[str]) -> Iterator[tuple[str, str]]:
    """The names below a node by which something is called, with their keys."""
    names: Any = list(node) if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        below = f"{key}.{name}" if isinstance(node, DictConfig) else f"{key}[{name}]"
        try:
            value = node[name]
        except OmegaConfBaseException as error:
            if name in called:
                raise UserError(f"{below} must be a name; {str(error).splitlines()[0]}") from error
            continue  # what Hydra fills in later, as the folder of a run
        if isinstance(value, Container):
            yield from _named(value, below, _CALLED_BY_LOGGING if str(name).endswith("_logging") else called)
        elif value is not None and (name in called or str(value).startswith("ext://")):
            yield below, str(value)
