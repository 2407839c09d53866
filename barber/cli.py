"""The command line: compose the config, run the experiment, one sentence for a mistake."""

import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import wraps
from pathlib import Path
from threading import Timer
from typing import Any
from uuid import uuid4

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from barber.commands import run_of
from barber.complaints import about, interrupted, sentence
from barber.errors import BarberError, UserError, in_one_line
from barber.naming import choices_of, digest, plan, quoted, register
from barber.targets import hold_hydra

log = logging.getLogger("barber")

# Of the processes that torchrun starts, one speaks and writes.
_TOGETHER = int(os.environ.get("WORLD_SIZE", "1")) > 1
_LEADS = not _TOGETHER or os.environ.get("RANK", "0") == "0"
# The folder of the sweep that goes on in this process, and where its lines begin in the file of its jobs.
_sweeps: list[tuple[Path, int]] = []
# What this process has until its end: its run folder.
_held = ExitStack()


def main() -> None:
    """Run `barber`. Exit code 0: done; 1: the run failed; 2: a mistake of the user's, said in one sentence."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them its own way
    # A cluster's way to end a job: the record has to say so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _held.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
    _held.callback(signal.signal, signal.SIGTERM, lambda *_: None)  # what has come to its end needs not be told to
    sys.unraisablehook = _send_again
    _sweeps.clear()
    try:
        Path.cwd()
    except OSError:
        sys.exit(_say("the working folder is gone; change to one that is there", UserError.exit_code))
    with _held:
        if _TOGETHER:
            from barber.runtime.ending import end_in_time

            end_in_time()
        if not _LEADS:
            sys.argv += _writing_to(_held.enter_context(tempfile.TemporaryDirectory(prefix="barber-")))
        try:
            _main()
        finally:
            _flush()


def _flush() -> None:
    """Write what is left to be read, and let nobody hear of it where the reader is gone, as `head` is."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main() -> None:
    try:
        sys.argv[1:] = run_of(sys.argv[1:], _held)
    except BarberError as error:
        sys.exit(_say(str(error), error.exit_code))
    try:
        _job()
    except BarberError as error:
        sys.exit(error.exit_code)  # a run that has said it
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(_complain(error))
    except BrokenPipeError:
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # Hydra's, of its own files in the run folder
        _summarise()
        sys.exit(_say(about(error), 1))
    except KeyboardInterrupt:
        said = interrupted(is_sweep=bool(_sweeps))
        _summarise()
        sys.exit(_say(said, 130))
    except Exception as error:
        if not _sweeps:
            sys.exit(_complain(error))
        _summarise()  # a launcher or a sweeper that gave up
        sys.exit(_say(f"the sweep has ended early: {error}", 1))
    sys.exit(_summarise())


def _send_again(lost: Any) -> None:
    """Python drops what a signal raises in a destructor: let it come once more, a moment later."""
    number = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(lost.exc_type)
    if number is None:
        sys.__unraisablehook__(lost)
    else:
        Timer(0.1, os.kill, (os.getpid(), number)).start()


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
    except BrokenPipeError:
        raise
    except (BarberError, OSError) as error:
        _keep_the_traceback(error)
        exit_code = _say(*((str(error), error.exit_code) if isinstance(error, BarberError) else (about(error), 1)))
        traceback.clear_frames(error.__traceback__)  # with the frames of a failed job its model would stay
        if not is_one_of_many:  # here Hydra would add a line of its own to an exception
            raise SystemExit(exit_code) from error
    except Exception as error:
        _keep_the_traceback(error)
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
    from barber.run.sweeps import announce, carry_out, objective

    values, folder = _resolved(config), Path(hydra_config.runtime.output_dir)
    announce(int(hydra_config.job.num), Path(hydra_config.sweep.dir), list(hydra_config.overrides.task))
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

    from barber.config import experiment, refuse_merged
    from barber.run.lifecycle import refusal_noted
    from barber.run.runner import run

    disable_progress_bar()  # the run has bars of its own
    choices = choices_of(hydra_config.runtime.choices, values)
    on_device = {"device": device} if device and values["device"] in ("auto", "cuda") else {}
    said = list(hydra_config.overrides.task)
    with refusal_noted(values, said, choices, folder if _LEADS else None):
        refuse_merged(said, values)
        built = experiment(values | on_device)
    return run(built, values, said, folder, choices)


def _resolved(config: DictConfig) -> dict[str, Any]:
    from barber.config import resolved

    return resolved(config)


def _or_refuse(callback: Callable[..., None]) -> Callable[..., None]:
    """End the program with what a callback fails of, in one sentence: Hydra would warn, and go on without it."""

    @wraps(callback)
    def checked(*arguments: Any, **named: Any) -> None:
        try:
            callback(*arguments, **named)
        except OmegaConfBaseException:
            return  # a value that the run, which begins with them all, tells by its own key
        except Exception as error:
            code = error.exit_code if isinstance(error, BarberError) else 1
            raise _refusal(in_one_line(error), code) from error

    return checked


class KeepFinishedRuns(Callback):
    """Claim the output folder, and refuse one with another finished run in it, before Hydra writes its files there."""

    @_or_refuse
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look into the folder of a single run; one that is named after the time may become another."""
        from barber.run.claim import TakenError, owned, siblings
        from barber.run.reading import successful

        HydraConfig.instance().set_config(config)  # its name asks for the choices, which Hydra would set up later
        folder = _made("hydra.run.dir", Path(config.hydra.run.dir))
        if not _LEADS:
            return
        tells_time = "${now:" in str(OmegaConf.to_container(config.hydra.run)["dir"])  # type: ignore[index, call-overload]
        for candidate in siblings(folder) if tells_time else [folder]:
            try:
                if (finished := successful(candidate)) is None:
                    _held.enter_context(owned(candidate))
                    finished = successful(candidate)  # as may be by now
                break
            except BarberError as error:
                if not (tells_time and isinstance(error, TakenError)):
                    raise _refusal(str(error), error.exit_code) from error
        if candidate != folder:
            with read_write(config.hydra):
                config.hydra.run.dir = str(candidate)
            HydraConfig.instance().set_config(config)
        if finished is not None:
            raise _end_of_finished(config, candidate, finished)

    @_or_refuse
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin a sweep."""
        from barber.run.sweeps import PLAN, SWEEP, position

        HydraConfig.instance().set_config(config)
        os.environ[SWEEP], os.environ[PLAN] = uuid4().hex, json.dumps(plan(config))
        if _TOGETHER:
            raise _refusal("torchrun shares out one run and not a sweep; start each of its jobs under torchrun")
        folder = _made("hydra.sweep.dir", Path(config.hydra.sweep.dir))
        with read_write(config.hydra):
            said = config.hydra.overrides.hydra
            if "max_failure_rate" in config.hydra.sweeper and not any("max_failure_rate" in one for one in said):
                config.hydra.sweeper.max_failure_rate = 1.0  # a search goes on without a trial that failed
            # The jobs' configs are composed anew, with these overrides: a folder that is named after choices stays one.
            said.append(f"hydra.sweep.dir={quoted(folder)}")
        _sweeps.append((folder, position(folder)))


def _made(key: str, folder: Path) -> Path:
    """The folder, which is there then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        own = isinstance(error, FileExistsError | NotADirectoryError | PermissionError)
        raise _refusal(f"{key} must be a folder to write to; {error}", UserError.exit_code if own else 1) from error
    return folder


def _refusal(sentence: str, exit_code: int = UserError.exit_code) -> SystemExit:
    """The end of the program for a mistake that a callback has found: Hydra turns its Exceptions into warnings."""
    return SystemExit(_say(sentence, exit_code))


def _end_of_finished(config: DictConfig, folder: Path, record: Any) -> SystemExit:
    """The end of a run whose folder holds a finished one: nothing is left to do if it is the same, as after a kill."""
    from barber.run.claim import clear, has_leftovers, owned
    from barber.run.display import console, show
    from barber.run.record import FILE
    from barber.runtime.ending import first_word

    with suppress(OmegaConfBaseException):  # which the composing of a run would say
        if config.resume != "never" and record.digest == digest(config):
            if has_leftovers(folder):
                with suppress(BarberError, OSError), owned(folder):
                    clear(folder)
            if _TOGETHER:
                first_word(0, "finished before")
            show(record, folder)
            console.print(f"\nFinished before, {record.finished}.")
            return SystemExit(0)
    return _refusal(f"hydra.run.dir must not hold a finished run, but there is {folder / FILE}; choose another")


# Here, where launchers' own processes find it, too: they import this module for `_job`.
hold_hydra()
register()


def _writing_to(folder: str) -> list[str]:
    """Overrides for a process that helps another one (torchrun): it writes no run folder and says nothing."""
    folders = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", "hydra.output_subdir=null"]
    return [*folders, "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def _keep_the_traceback(error: Exception) -> None:
    """For run.log; the console gets one sentence."""
    from barber.run.claim import TakenError

    with suppress(OSError):  # a full disk may be what the run has failed of
        if not isinstance(error, TakenError):  # whose log is another run's
            log.debug("The run failed.", exc_info=error)


def _complain(error: Exception) -> int:
    """Say what is wrong with the command line; returns the exit code."""
    return _say(sentence(error, sys.argv[1:]), UserError.exit_code)


def _say(sentence: str, exit_code: int) -> int:
    """Say why the program ends, once; returns the exit code."""
    if _TOGETHER:
        from barber.runtime.ending import first_word

        if not first_word(exit_code, sentence).is_own:
            return exit_code
    print(f"barber: {sentence}", file=sys.stderr)
    return exit_code
