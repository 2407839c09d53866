"""A run's record from its start to its end, whatever the end is."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from barber.errors import BarberError, in_one_line
from barber.run.record import RunRecord
from barber.run.tracking import Tracking


@contextmanager
def recorded(record: RunRecord, folder: Path, tracking: Tracking, leads: bool) -> Iterator[None]:
    """Keep a record while the run goes on inside this context: how it ends is written down, also if it fails.

    Args:
        leads: whether this process writes.

    Raises:
        BarberError: the device is out of memory; any other error as it is.
    """

    def finish(error: str | None) -> None:
        record.error = error
        if error is not None:
            record.traceback = traceback.format_exc()
        if leads:
            record.finish("success" if error is None else "failed", folder)

    if leads:
        record.write(folder)
    try:
        yield
        finish(None)
    except torch.OutOfMemoryError as error:
        message = "out of memory on the device: a smaller batch_size or engine.activations=host needs less"
        finish(message)
        raise BarberError(message) from error
    except BaseException as error:
        finish(in_one_line(error))
        raise
    finally:
        tracking.finish(record)
