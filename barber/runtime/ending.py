"""How the processes of one run end: whatever ends one of them ends all, and the first to fail says why.

Its word lies in the store at which torchrun lets the processes meet. Who fails because another one has is silent.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from barber.errors import BarberError

# What torchrun gives a process that it has told to end is half a minute.
_PATIENCE_SECONDS = 5.0
# What gloo and NCCL say when the process at the other end is gone.
_OF_THE_OTHER_END = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")


@dataclass(frozen=True)
class Word:
    """Why a run ends, the exit code that goes with it, and the process that says so."""

    rank: int
    exit_code: int
    sentence: str

    @property
    def is_own(self) -> bool:
        """Whether it is that of this process."""
        return self.rank == _rank()


class EndedError(BarberError):
    """Another process of the run has ended it."""

    def __init__(self, word: Word) -> None:
        super().__init__(word.sentence)
        self.exit_code = word.exit_code


def first_word(exit_code: int, sentence: str) -> Word:
    """Say why this process ends, if none has said so before; returns what was said first."""
    try:
        said = store().compare_set(_key("end"), "", json.dumps([_rank(), exit_code, sentence]))
    except (DistError, RuntimeError):  # it has gone with the process that had it, the first one
        return Word(0, exit_code, sentence)
    return Word(*json.loads(said))


@contextmanager
def together(size: int) -> Iterator[None]:
    """Whatever ends this process inside this context is said to the others, unless they were the first.

    Raises:
        EndedError: another one was.
        BarberError: another one is gone, without a word.
    """
    try:
        yield
    except BaseException as error:
        if size == 1:
            raise
        others = isinstance(error, RuntimeError) and any(part in str(error) for part in _OF_THE_OTHER_END)
        lost = BarberError("another process of this run has ended without a word; the same command goes on with it")
        ending = lost if others else error
        word = first_word(*_said(ending))
        if not word.is_own:
            raise EndedError(word) from error
        if others:
            raise lost from error
        raise


def wait_for_all(size: int, where: str) -> None:
    """Wait until all processes have come to a place, which may be seconds or minutes apart.

    Args:
        size: how many there are.
        where: the name of the place.

    Raises:
        EndedError: one of them has ended instead.
    """
    meeting = store()
    meeting.set(_key(f"{where}/{_rank()}"), "")
    for rank in range(size):
        for tries in count():
            if meeting.check([_key(f"{where}/{rank}")]):
                break
            if meeting.check([_key("end")]):
                raise EndedError(Word(*json.loads(meeting.get(_key("end")))))
            time.sleep(min(0.01 * (tries + 1), 0.2))


@cache
def store() -> Store:
    """Where the processes meet, before they can talk to each other and also when they cannot any more."""
    found: Store = next(rendezvous("env://", timeout=timedelta(seconds=60)))[0]
    return found


def end_in_time() -> None:
    """Let a SIGTERM end this process also where its main thread waits for another one and hears nothing."""
    heard, ear = os.pipe()
    os.set_blocking(ear, False)
    signal.set_wakeup_fd(ear, warn_on_full_buffer=False)

    def listen() -> None:
        while os.read(heard, 1)[0] != signal.SIGTERM:
            pass
        time.sleep(_PATIENCE_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()


def _said(error: BaseException) -> tuple[int, str]:
    if isinstance(error, BarberError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, SystemExit):
        return 128 + signal.SIGTERM, "the run was told to end"
    return 1, f"{type(error).__name__}: {error}"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _key(name: str) -> str:
    return f"barber/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
