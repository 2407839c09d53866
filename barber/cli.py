"""The command line: compose the config, run the experiment, one sentence for a mistake."""

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from barber.errors import BarberError, UserError

log = logging.getLogger("barber")

# Of the processes that torchrun starts, one speaks and writes.
_TOGETHER = int(os.environ.get("WORLD_SIZE", "1")) > 1
_LEADS = not _TOGETHER or os.environ.get("RANK", "0") == "0"
# torchrun ends all of them as soon as one has failed: seconds that the others leave to the one that speaks.
PATIENCE = 10.0


def main() -> None:
    """Run `barber`. Exit code 0: done; 1: the run failed; 2: a mistake of the user's, said in one sentence."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them its own way
    # A cluster's way to end a job: the record has to say so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ExitStack() as stack:
        if not _LEADS:
            sys.argv += _writing_to(stack.enter_context(tempfile.TemporaryDirectory(prefix="barber-")))
        _main()


def _main() -> None:
    try:
        _job()
    except BarberError as error:
        sys.exit(error.exit_code)  # a job of a sweep, which has said it
    except (HydraException, OmegaConfBaseException) as error:
        from barber.complaints import sentence

        _leave_the_word()
        sys.exit(_say(sentence(error), UserError.exit_code))
    except ValueError as error:
        if "Config group override" not in str(error):  # then it is not Hydra's, about GROUP=null
            raise
        from barber.complaints import nameless_choice

        sys.exit(_say(nameless_choice(sys.argv[1:]) or str(error), UserError.exit_code))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))


@hydra.main(config_path="pkg://barber.conf", config_name="config", version_base="1.3")
def _job(config: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    try:
        # Imported here: `barber --help` need not wait for torch.
        from transformers.utils.logging import disable_progress_bar

        from barber.config import experiment, resolved
        from barber.display import show
        from barber.runner import run

        disable_progress_bar()  # the run has bars of its own
        values = resolved(config)
        record = run(experiment(values), values, list(hydra_config.overrides.task), folder)
        if _LEADS:
            show(record, folder)
    except BarberError as error:
        log.debug("The run failed.", exc_info=True)  # run.log has the traceback, the console one sentence
        exit_code = _say(str(error), error.exit_code)
        _leave_the_word()
        if hydra_config.mode == RunMode.RUN:  # here Hydra would add a line of its own to an exception
            raise SystemExit(exit_code) from error
        # A sweep keeps the exceptions of its jobs to the end, and with their frames the models.
        traceback.clear_frames(error.__traceback__)
        raise
    except BaseException as error:
        log.debug("The run failed.", exc_info=True)
        traceback.clear_frames(error.__traceback__)
        _leave_the_word()
        raise


class KeepFinishedRuns(Callback):
    """Refuse an output folder with a finished run in it, before Hydra writes its own files there."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look into the folder of a single run."""
        HydraConfig.instance().set_config(config)  # its name asks for the choices, which Hydra would set up later
        _check_folder("hydra.run.dir", Path(config.hydra.run.dir), in_subfolders=False)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look into the folders of a sweep."""
        HydraConfig.instance().set_config(config)
        if _TOGETHER:
            sentence = "torchrun shares out one run and not a sweep; start each of its jobs under torchrun"
            raise SystemExit(_say(sentence, UserError.exit_code))
        _check_folder("hydra.sweep.dir", Path(config.hydra.sweep.dir), in_subfolders=True)


def _check_folder(key: str, folder: Path, in_subfolders: bool) -> None:
    """Make the folder; a mistake ends the program, as Hydra turns a callback's Exception into a warning."""
    from barber.record import FILE, successful

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(_say(f"{key} must be a folder to write to; {error}", UserError.exit_code)) from error
    for record in folder.rglob(FILE) if in_subfolders else [folder / FILE]:
        if successful(record.parent):
            raise SystemExit(
                _say(f"{key} must not hold a finished run, but there is {record}; choose another", UserError.exit_code)
            )


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
