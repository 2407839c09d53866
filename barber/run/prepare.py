"""What a run does before any weight is read: check all there is to check, read what is cheap."""

import logging
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.data.calibration import CalibrationSet, TokenSamples, save_samples
from barber.data.texts import TokenFile
from barber.errors import within
from barber.evals.evaluation import Evaluation, Prepared
from barber.model.families import family_of
from barber.model.sources import skeleton
from barber.run.experiment import Experiment
from barber.run.record import Calibration, Machine, RunRecord, Seeds
from barber.runtime.distributed import Ranks, local_device
from barber.walk.checks import check_architecture, check_methods, check_tokens, resolve_device
from barber.walk.skipping import skipped

log = logging.getLogger("barber")


@dataclass
class Inputs:
    """What a run works on, checked before any weight is read.

    Args:
        skeleton: the model without its weights, on the meta device.
        left_out: the linears that stay dense, by name.
    """

    device: torch.device
    skeleton: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    streams: bool = False
    calibration: CalibrationSet | None = None
    evaluation: Prepared | None = None
    left_out: frozenset[str] = frozenset()


def prepare(experiment: Experiment, record: RunRecord, ranks: Ranks, folder: Path) -> Inputs:
    """Check all there is to check and read what is cheap: config, tokenizer, texts.

    What is measured on is read by the process that leads: the others have no part in that.
    """
    check_methods(experiment.pattern, experiment.pruner, experiment.steps, experiment.schedule)
    if experiment.allocation is not None and experiment.pruner is not None:
        with within("allocation"):
            experiment.allocation.check(experiment.pattern)
    if experiment.tracker is not None:
        experiment.tracker.check()
    device = local_device(resolve_device(experiment.device))
    with within("precision"):
        experiment.precision.check(device)
    with within("model"):
        config = experiment.model.config()
    family_of(config)  # before transformers builds the model: of others it has warnings and errors of its own
    with within("model"):
        model = skeleton(config)
    left_out = skipped(experiment.skip, model)
    check_architecture(model, experiment.pattern, left_out)
    with within("model"):
        tokenizer = experiment.model.tokenizer()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    record.machine = Machine(str(device), torch.get_num_threads(), platform.platform(), gpu)
    record.seeds = Seeds(experiment.seed, calibration=None)
    with within("model"):
        inputs = Inputs(device, model, tokenizer, experiment.engine.streams(model), left_out=left_out)
    if experiment.pruner is not None:
        with within("calibration"):
            inputs.calibration = experiment.calibration.sample(tokenizer, experiment.cache)
        from_file = isinstance(experiment.calibration, TokenSamples)
        keys = ("calibration.path",) if from_file else ("calibration", "calibration.seqlen")
        check_tokens(inputs.calibration.tokens_NL, config, *keys)
        ranks.require_samples(len(inputs.calibration.tokens_NL))
        if experiment.calibration.save is not None and ranks.leads:
            with within("calibration"):
                save_samples(inputs.calibration, Path(experiment.calibration.save))
        record.seeds = Seeds(experiment.seed, inputs.calibration.seed)
        record.calibration = _described(inputs.calibration)
    if experiment.evals is not None and ranks.leads:
        inputs.evaluation = _prepare_evaluation(experiment, experiment.evals, inputs, folder)
    return inputs


def _prepare_evaluation(experiment: Experiment, evals: Evaluation, inputs: Inputs, folder: Path) -> Prepared:
    """Read the texts and the tasks' data."""
    with within("evals"):
        prepared = evals.prepare(inputs.tokenizer, folder / "tasks", experiment.cache)
    config = inputs.skeleton.config
    for text in evals.texts if evals.reads_texts else ():
        key = f"evals.texts.{text}" + (".path" if isinstance(evals.texts[text], TokenFile) else "")
        for name in evals.windows_of(text):
            windows = prepared.windows[name]
            check_tokens(windows.tokens_NL, config, key, "evals.seqlen")
            num, seqlen = windows.tokens_NL.shape
            log.info("Evaluation on %s: %d windows of %d tokens from %s.", name, num, seqlen, windows.source)
    return prepared


def _described(calibration: CalibrationSet) -> Calibration:
    samples, seqlen = calibration.tokens_NL.shape
    described = Calibration(calibration.source, samples, seqlen, calibration.digest, calibration.distinct)
    log.info("Calibration: %s.", described)
    if described.repeats:
        sentence = "Only %d of the %d calibration samples are distinct: the others repeat them and tell nothing new."
        log.warning(sentence, described.distinct, samples)
    return described
