"""What every finished block is told to: layers.jsonl, the log, the progress bar, the tracker."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from transformers import PreTrainedModel

from barber.model.decoder import Decoder
from barber.run import display
from barber.run.tracking import Tracking
from barber.runtime.files import append_line, writing
from barber.runtime.plain import plain
from barber.walk.pruning import OnBlock
from barber.walk.report import BlockReport
from barber.walk.walk import BlockResult

log = logging.getLogger("barber")

LAYERS = "layers.jsonl"


@contextmanager
def block_by_block(folder: Path, model: PreTrainedModel, tracking: Tracking, leads: bool) -> Iterator[OnBlock]:
    """Whom a walk has to tell of its blocks.

    Args:
        folder: of the run.
        leads: whether this process writes; the others have no lines to write and nobody who watches.
    """
    layers = Decoder(model).layers
    path = folder / LAYERS
    numbers = count(1)
    if leads:
        with writing(path):
            path.write_bytes(b"")
    with display.progress(visible=leads) as progress:
        task = progress.add_task("Pruning, block by block", total=sum(len(layer.blocks) for layer in layers))

        def on_block(block: BlockReport, result: BlockResult | None) -> None:
            if leads:
                append_line(path, json.dumps(plain(block)))
            if result is not None:
                log.info(display.describe(block, len(layers)))
            tracking.block(next(numbers), block)
            progress.advance(task)

        yield on_block
