"""Initial masks that other runs have kept, or a place to keep them for others."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedModel

from barber.evals.cache import ResultCache
from barber.methods.patterns import Pattern
from barber.model.decoder import Decoder
from barber.model.weights import Weights
from barber.run.experiment import Experiment
from barber.run.prepare import Inputs
from barber.run.record import Initial, RunRecord
from barber.runtime.distributed import Ranks
from barber.walk.initial import InitialMasks

log = logging.getLogger("barber")


@contextmanager
def initial_masks(
    experiment: Experiment,
    record: RunRecord,
    inputs: Inputs,
    model: PreTrainedModel,
    weights: Weights,
    pattern: Pattern | Mapping[str, Pattern],
    ranks: Ranks,
) -> Iterator[InitialMasks | None]:
    """The initial masks of a run, by all that they depend on.

    None where they are cheap, and where several processes need not share a disk.
    """
    cache, pruner, calibration = experiment.cache, experiment.pruner, inputs.calibration
    interleaves = experiment.schedule == "interleaved" and bool(experiment.steps)
    if cache is None or pruner is None or pruner.statistic is None or interleaves or ranks.size > 1:
        yield None
        return
    assert calibration is not None
    dense = inputs.evaluation.dense if inputs.evaluation is not None else None
    with weights.showing("dense"):
        facts = (dense or ResultCache(cache, model, inputs.device, weights)).facts
    facts = facts | {"calibration": calibration.digest, "pruner": repr(pruner), "pattern": repr(experiment.pattern)}
    facts |= {"precision": record.machine.precision, "batch_size": record.machine.batch_size}
    if isinstance(pattern, Mapping):
        facts |= {"patterns": {name: str(one) for name, one in pattern.items()}}
    entry = cache.entry("initial", facts)
    with entry.opened("the initial masks") as complete:
        if complete:
            log.info("The initial masks are known from another run.")
        masks = InitialMasks(entry.folder, complete)
        record.initial = Initial(known=complete, seconds=masks.seconds)
        yield masks
        if complete:
            return
        record.initial = Initial(known=False, seconds=masks.seconds)
        if masks.has_all(len(Decoder(model).layers)):
            try:
                entry.complete()
            except OSError as error:
                log.warning("The initial masks are not kept for other runs: %s", error)
