"""Damage in a checkpoint, looked for before a run goes on with it."""

import logging

from barber.model.checkpoint import MODEL, Checkpoint
from barber.runtime.seals import DamagedError, Seal

log = logging.getLogger("barber")


def drop_damaged(checkpoint: Checkpoint) -> None:
    """Compare all files with what was written, and remove the layers that cannot be gone on with.

    That is a damaged layer, and with it all that come after it. What a layer begins with is there for the last of them
    only, so it may be all.
    """
    last = max((index for index in range(checkpoint.num_layers) if checkpoint.marks(index)), default=-1)
    reason: DamagedError | None = None
    begin = 0
    try:
        while begin <= last:
            checkpoint.require(begin, "layer", "pruned")
            begin += 1
    except DamagedError as error:
        reason = error
    try:
        Seal.read(checkpoint.folder / MODEL)
    except DamagedError as error:
        if begin:
            reason, begin = error, 0
    while 0 < begin < checkpoint.num_layers:
        try:
            checkpoint.require(begin - 1, "activations")
            break
        except DamagedError as error:
            reason, begin = reason or error, begin - 1
    if reason is not None:
        again = f"layers {begin} to {last}" if begin else f"all layers, {last + 1} of them done,"
        log.warning("%s; %s are computed again.", reason, again)
        checkpoint.drop(begin)
