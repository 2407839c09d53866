"""A run's record from its start to its end, whatever the end is."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from barber.errors import BarberError, DiskError, in_one_line
from barber.run.record import RunRecord
from barber.run.tracking import Tracking


@contextmanager
def recorded(record: RunRecord, folder: Path, tracking: Tracking, leads: bool) -> Iterator[None]:
    """Keep a record while the run goes on inside this context: how it ends is written down, also if it fails.

    Args:
        leads: whether this process writes.

    Raises:
        BarberError: the device is out of memory, or the disk does not take the record; any other error as it is.
    """

    def fail(error: str) -> None:
        record.error, record.traceback = error, traceback.format_exc()
        if leads:
            with suppress(DiskError):  # it may be what the run fails of
                record.finish("failed", folder)

    if leads:
        record.write(folder)
    try:
        yield
        if leads:
            record.finish("success", folder)
    except torch.OutOfMemoryError as error:
        message = "out of memory on the device: a smaller batch_size or engine.activations=host needs less"
        fail(message)
        raise BarberError(message) from error
    except BaseException as error:
        fail(in_one_line(error))
        raise
    finally:
        tracking.finish(record)


@contextmanager
def refusal_noted(
    config: Mapping[str, Any], overrides: list[str], choices: Mapping[str, str | None], folder: Path | None
) -> Iterator[None]:
    """Leave the record of a run whose config is refused inside this context, in `folder` if there is one."""
    try:
        yield
    except BarberError as error:
        if folder is not None:
            record = RunRecord.begin(_finite(dict(config)), overrides, dict(choices))
            record.error, record.traceback = str(error), traceback.format_exc()
            with suppress(DiskError):
                record.finish("failed", folder)
        raise


def _finite(node: Any) -> Any:
    """A config as JSON can hold it: what is no number, as text."""
    if isinstance(node, dict):
        return {name: _finite(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_finite(value) for value in node]
    return str(node) if isinstance(node, float) and not isfinite(node) else node
