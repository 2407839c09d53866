"""What every finished block is told to: layers.jsonl, the log, the progress bar, the tracker."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path

from transformers import PreTrainedModel

from barber.model.decoder import Decoder
from barber.run import display
from barber.run.tracking import Tracking
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
    path = folder / LAYERS if leads else Path(os.devnull)
    numbers = count(1)
    with display.progress(visible=leads) as progress, path.open("w", encoding="utf-8") as lines:
        task = progress.add_task("Pruning, block by block", total=sum(len(layer.blocks) for layer in layers))

        def on_block(block: BlockReport, result: BlockResult | None) -> None:
            lines.write(json.dumps(asdict(block)) + "\n")
            lines.flush()
            if result is not None:
                log.info(display.describe(block, len(layers)))
            tracking.block(next(numbers), block)
            progress.advance(task)

        yield on_block
