"""The command line: compose the config, run the experiment, one sentence for a mistake."""

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from barber.errors import BarberError, UserError, in_one_line

log = logging.getLogger("barber")

# Of the processes that torchrun starts, one speaks and writes.
_TOGETHER = int(os.environ.get("WORLD_SIZE", "1")) > 1
_LEADS = not _TOGETHER or os.environ.get("RANK", "0") == "0"
# torchrun ends all of them as soon as one has failed: seconds that the others leave to the one that speaks.
PATIENCE = 10.0
# The folder of the sweep that goes on in this process, and where its lines begin in the file of its jobs.
_sweeps: list[tuple[Path, int]] = []


def main() -> None:
    """Run `barber`. Exit code 0: done; 1: the run failed; 2: a mistake of the user's, said in one sentence."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them its own way
    # A cluster's way to end a job: the record has to say so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _sweeps.clear()
    with ExitStack() as stack:
        if not _LEADS:
            sys.argv += _writing_to(stack.enter_context(tempfile.TemporaryDirectory(prefix="barber-")))
        _main()


def _main() -> None:
    try:
        _job()
    except BarberError as error:
        sys.exit(error.exit_code)  # a run that has said it
    except (HydraException, OmegaConfBaseException) as error:
        from barber.complaints import sentence

        _leave_the_word()
        sys.exit(_say(sentence(error), UserError.exit_code))
    except KeyboardInterrupt:
        _summarise()
        sys.exit(_say("interrupted", 130))
    except Exception as error:
        if isinstance(error, ValueError) and "Config group override" in str(error):  # Hydra's, about GROUP=null
            from barber.complaints import nameless_choice

            sys.exit(_say(nameless_choice(sys.argv[1:]) or str(error), UserError.exit_code))
        if not _sweeps:
            raise
        _summarise()  # a launcher or a sweeper that gave up
        sys.exit(_say(f"the sweep has ended early: {error}", 1))
    sys.exit(_summarise())


def _summarise() -> int:
    """What became of a sweep, if this was one; returns the exit code."""
    if not _sweeps:
        return 0
    from barber.run.sweeps import summary

    return summary(*_sweeps.pop())


@hydra.main(config_path="pkg://barber.conf", config_name="config", version_base="1.3")
def _job(config: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    is_one_of_many = hydra_config.mode == RunMode.MULTIRUN
    try:
        # Imported here: `barber --help` need not wait for torch.
        if is_one_of_many:
            return _one_of_many(config, hydra_config)
        _single(config, hydra_config)
    except BarberError as error:
        log.debug("The run failed.", exc_info=True)  # run.log has the traceback, the console one sentence
        exit_code = _say(str(error), error.exit_code)
        _leave_the_word()
        traceback.clear_frames(error.__traceback__)  # with the frames of a failed job its model would stay
        if not is_one_of_many:  # here Hydra would add a line of its own to an exception
            raise SystemExit(exit_code) from error
    except Exception as error:
        log.debug("The run failed.", exc_info=True)
        _leave_the_word()
        if not _LEADS:  # it has no run.log, and the others may know nothing of this
            raise
        exit_code = _say(f"{in_one_line(error)} (run.log has the traceback)", 1)
        traceback.clear_frames(error.__traceback__)
        if not is_one_of_many:
            raise SystemExit(exit_code) from error
    return None


def _single(config: DictConfig, hydra_config: Any) -> None:
    from barber.run.display import show

    values, folder = _resolved(config), Path(hydra_config.runtime.output_dir)
    record = _run(values, hydra_config, folder)
    if _LEADS:
        show(record, folder)


def _one_of_many(config: DictConfig, hydra_config: Any) -> float | None:
    """A job of a sweep; returns the figure that a search is for."""
    from barber.run.identity import digest_of
    from barber.run.sweeps import carry_out, objective

    values, folder = _resolved(config), Path(hydra_config.runtime.output_dir)
    results = carry_out(
        lambda device: _run(values, hydra_config, folder, device),
        folder=folder,
        sweep=Path(hydra_config.sweep.dir),
        digest=digest_of(values),
        overrides=list(hydra_config.overrides.task),
        may_skip=values["resume"] != "never",
    )
    key = values["objective"]
    return None if key is None or results is None else objective(results, key)


def _run(values: dict[str, Any], hydra_config: Any, folder: Path, device: str | None = None) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from barber.config import experiment
    from barber.run.runner import run

    disable_progress_bar()  # the run has bars of its own
    _refuse_merged(hydra_config.overrides.task, values)
    choices = _choices(hydra_config.runtime.choices, values)
    on_device = {"device": device} if device and values["device"] in ("auto", "cuda") else {}
    return run(experiment(values | on_device), values, list(hydra_config.overrides.task), folder, choices)


def _refuse_merged(overrides: Sequence[str], values: Mapping[str, Any]) -> None:
    """Refuse several choices that are one and the same step: Hydra would make one of them, without a word."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group, chosen = override.key_or_group, override.value()
        if group in ("rebuild", "update") and isinstance(chosen, list) and len(chosen) != len(values.get(group) or {}):
            names = ",".join(map(str, chosen))
            raise UserError(f"{group}=[{names}] must name every step once, and none only by itself")


def _resolved(config: DictConfig) -> dict[str, Any]:
    from barber.config import resolved

    return resolved(config)


class KeepFinishedRuns(Callback):
    """Refuse an output folder with a finished run in it, before Hydra writes its own files there."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look into the folder of a single run."""
        from barber.run.reading import successful
        from barber.run.record import FILE

        HydraConfig.instance().set_config(config)  # its name asks for the choices, which Hydra would set up later
        folder = _made("hydra.run.dir", Path(config.hydra.run.dir))
        try:
            is_finished = successful(folder) is not None
        except UserError as error:
            raise _refusal(str(error)) from error
        if is_finished:
            raise _refusal(f"hydra.run.dir must not hold a finished run, but there is {folder / FILE}; choose another")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin a sweep."""
        from barber.run.sweeps import position

        HydraConfig.instance().set_config(config)
        if _TOGETHER:
            raise _refusal("torchrun shares out one run and not a sweep; start each of its jobs under torchrun")
        folder = _made("hydra.sweep.dir", Path(config.hydra.sweep.dir))
        _sweeps.append((folder, position(folder)))


def _made(key: str, folder: Path) -> Path:
    """The folder, which is there then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(f"{key} must be a folder to write to; {error}") from error
    return folder


def _refusal(sentence: str) -> SystemExit:
    """The end of the program for a mistake that a callback has found: Hydra turns its Exceptions into warnings."""
    exit_code = _say(sentence, UserError.exit_code)
    _leave_the_word()
    return SystemExit(exit_code)


def _digest(*, _root_: DictConfig) -> str:
    """Twelve characters that tell the jobs of a sweep apart and find a job's folder again."""
    from barber.run.identity import digest_of

    own = OmegaConf.create({str(key): node for key, node in _root_.items_ex(resolve=False) if key != "hydra"})
    values = OmegaConf.to_container(own, resolve=True)
    assert isinstance(values, dict)
    return digest_of({str(key): value for key, value in values.items()})[:12]


def _job_folder(*, _root_: DictConfig) -> str:
    """The name of a job's folder in that of its sweep: a job that was done under another name is found."""
    from barber.run.reading import folder_of_job

    return folder_of_job(Path(_root_.hydra.sweep.dir), str(_root_.name), _digest(_root_=_root_)).name


def _choices(choices: Mapping[Any, Any], config: Mapping[Any, Any]) -> dict[str, str | None]:
    """The chosen option of every group; Hydra says nothing of a group of which several are chosen."""
    chosen = {str(group): choice for group, choice in choices.items() if "/" not in str(group)}
    steps = {group: "_".join(map(str, config.get(group) or {})) or "none" for group in ("rebuild", "update")}
    return {**steps, **chosen}


def _chosen(*, _root_: DictConfig) -> str:
    """What a run is called: its methods, of the groups that are left alone by default only where they are not."""
    chosen = _choices(HydraConfig.get().runtime.choices, _root_)
    groups = {"model": "", "pattern": "", "allocation": "uniform", "pruner": "", "rebuild": "", "update": "none"}
    return "_".join(str(chosen.get(group)) for group, silent in groups.items() if chosen.get(group) != silent)


def _sweep(*, _root_: DictConfig) -> str:
    """The name of a sweep: its experiment, or else what its runs are called."""
    return str(_root_.hydra.runtime.choices.get("experiment") or _root_.name)


# Here, where launchers' own processes find it, too: they import this module for `_job`.
OmegaConf.register_new_resolver("chosen", _chosen, replace=True)
OmegaConf.register_new_resolver("job_folder", _job_folder, replace=True)
OmegaConf.register_new_resolver("sweep", _sweep, replace=True)


def _writing_to(folder: str) -> list[str]:
    """Overrides for a process that helps another one (torchrun): it writes no run folder and says nothing."""
    folders = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", "hydra.output_subdir=null"]
    return [*folders, "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def _leave_the_word() -> None:
    """Let the process that speaks fail first, if it does: torchrun ends the others then."""
    if not _LEADS:
        time.sleep(PATIENCE)


def _say(sentence: str, exit_code: int) -> int:
    if _LEADS:
        print(f"barber: {sentence}", file=sys.stderr)
    return exit_code
