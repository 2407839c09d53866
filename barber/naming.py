"""What runs, jobs and sweeps are called: by what is chosen, and a job by what it computes."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from barber.model.names import called

# Of a model's name: a folder's whole name has the time, methods and a digest in it, too.
_LONGEST = 80


def register() -> None:
    """Let configs ask for names: `${chosen:}`, `${job_folder:}`, `${sweep:}`."""
    OmegaConf.register_new_resolver("chosen", _chosen, replace=True)
    OmegaConf.register_new_resolver("job_folder", _job_folder, replace=True)
    OmegaConf.register_new_resolver("sweep", _sweep, replace=True)


def digest(config: DictConfig) -> str:
    """What tells the jobs of a sweep apart."""
    from barber.run.identity import digest_of

    own = OmegaConf.create({str(key): node for key, node in config.items_ex(resolve=False) if key != "hydra"})
    values = OmegaConf.to_container(own, resolve=True)
    assert isinstance(values, dict)
    return digest_of({str(key): value for key, value in values.items()})


def _job_folder(*, _root_: DictConfig) -> str:
    """The name of a job's folder in that of its sweep: a job that was done under another name is found."""
    from barber.run.reading import folder_of_job

    # Twelve characters are enough for one sweep.
    return folder_of_job(Path(_root_.hydra.sweep.dir), str(_root_.name), digest(_root_)[:12]).name


def choices_of(choices: Mapping[Any, Any], config: Mapping[Any, Any]) -> dict[str, str | None]:
    """The chosen option of every group; Hydra says nothing of a group of which several are chosen."""
    chosen = {str(group): choice for group, choice in choices.items() if "/" not in str(group)}
    steps = {group: "_".join(map(str, config.get(group) or {})) or "none" for group in ("rebuild", "update")}
    return {**steps, **chosen}


def _chosen(*, _root_: DictConfig) -> str:
    """What a run is called: its methods, of the groups that are left alone by default only where they are not."""
    chosen = choices_of(HydraConfig.get().runtime.choices, _root_)
    chosen = chosen | {"model": _model(chosen.get("model"), _root_)} | _swept_choices()
    groups = {"model": "", "pattern": "", "allocation": "uniform", "pruner": "", "rebuild": "", "update": "none"}
    return "_".join(str(chosen.get(group)) for group, silent in groups.items() if chosen.get(group) != silent)


def _model(choice: str | None, config: DictConfig) -> str | None:
    """The name of one's own model, as a folder's may be; without a path, which the run will say, that of the choice."""
    with suppress(OmegaConfBaseException):
        choice = re.sub(r"[^\w.-]+", "-", called(choice, config.model) or "").strip("-.")[:_LONGEST] or choice
    return choice


def plan(config: DictConfig) -> dict[str, Any]:
    """What a sweep will do: the keys that vary, and how many jobs there are; None where that is not known before."""
    sweeper = config.hydra.sweeper
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(given, list)
    swept = _swept([*map(str, given), *(f"{key}={values}" for key, values in (sweeper.get("params") or {}).items())])
    if "n_trials" in sweeper:
        return {"keys": list(swept), "jobs": sweeper.n_trials}
    return {"keys": list(swept), "jobs": prod(len(list(one.sweep_string_iterator())) for one in swept.values())}


def _swept(said: Sequence[str]) -> dict[str, Override]:
    """The overrides that take several values, by key."""
    # the others need not be parsed, and some cannot be
    parsed = OverridesParser.create().parse_overrides([line for line in said if re.search("[,(]", line)])
    return {one.key_or_group: one for one in parsed if one.is_sweep_override()}


def _swept_choices() -> dict[str, str | None]:
    """For the name of a whole sweep: of a group that takes several choices its own name."""
    # Not resolved: what somebody has typed may hold an interpolation.
    said = OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)
    swept = _swept(said["task"])  # type: ignore[index, call-overload]
    method: dict[str, str | None] = {"pruner": "method", "rebuild": "", "update": "none"} if "method" in swept else {}
    model: dict[str, str | None] = {"model": "model"} if "model.path" in swept else {}
    return method | model | {group: group for group in swept}


def quoted(path: Path) -> str:
    """A path as an override has it."""
    return "'" + str(path).replace("'", "\\'") + "'"


def _sweep(*, _root_: DictConfig) -> str:
    """The name of a sweep: its experiment, or else what its runs are called."""
    return str(_root_.hydra.runtime.choices.get("experiment") or _root_.name)
