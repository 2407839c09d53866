"""One run, from an experiment to its record: prepare, open, measure, allocate, prune, measure again, export.

Under torchrun every process goes through all stages, with its share of the samples; what writes asks who leads.
"""

import logging
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.data.calibration import CalibrationSet
from barber.data.texts import tokenizer_digest
from barber.errors import within
from barber.methods.patterns import Pattern, Unstructured
from barber.model.checkpoint import Checkpoint
from barber.model.contents import require_the_same, times_of
from barber.model.damage import drop_damaged
from barber.model.decoder import Decoder
from barber.model.difference import Difference
from barber.model.engine import SOURCE
from barber.model.weights import Stage, Weights
from barber.run import display
from barber.run.card import model_card
from barber.run.claim import FOLDER, begin, holds_layers
from barber.run.experiment import Experiment
from barber.run.export import MaskFile
from barber.run.identity import counting, digest_of
from barber.run.kept import initial_masks
from barber.run.lifecycle import recorded
from barber.run.notes import note_block_errors, note_dense, note_report
from barber.run.prepare import Inputs, prepare
from barber.run.record import Resumed, RunRecord
from barber.run.space import require_space
from barber.run.tracking import Tracking
from barber.run.watching import block_by_block
from barber.runtime.distributed import Ranks, joined
from barber.runtime.ending import together
from barber.runtime.memory import peak_memory, reset_peak_memory
from barber.runtime.tensors import Tensor
from barber.runtime.timing import Stopwatch
from barber.walk.allocation import Allocating
from barber.walk.checks import check_numbers
from barber.walk.pruning import Pruning
from barber.walk.sizes import fitting_batch_size
from barber.walk.skipping import of_the_rest

log = logging.getLogger("barber")


def run(
    experiment: Experiment,
    config: dict[str, Any],
    overrides: list[str],
    folder: Path,
    choices: Mapping[str, str | None] | None = None,
) -> RunRecord:
    """Carry out an experiment; `folder` then holds its record, layers.jsonl, loss.png and what it exports.

    Whoever calls this owns the folder.

    Args:
        config: the resolved config, for the record and the model card.
        overrides: the command line's share in it.
        choices: the chosen option of every config group.

    Raises:
        BarberError: the run failed; the record says so too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord.begin(config, overrides, dict(choices or {}), digest_of(config))
    with joined() as ranks:
        if experiment.export is not None and ranks.leads:
            experiment.export.check(folder, record.digest)  # before this run's own record takes the place of another
        tracking = Tracking(experiment.tracker if ranks.leads else None)
        run_ = _Run(experiment, record, tracking, folder, ranks)
        with recorded(record, folder, tracking, ranks.leads):
            try:
                with together(ranks.size):
                    run_.carry_out()
                    ranks.meet("end")  # before the record says success
            finally:
                run_.clean_up()
        run_.discard()
    return record


@dataclass
class _Run:
    experiment: Experiment
    record: RunRecord
    tracking: Tracking
    folder: Path
    ranks: Ranks
    checkpoint: Checkpoint | None = None
    opened: bool = False
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def carry_out(self) -> None:
        experiment, record = self.experiment, self.record
        record.seconds = self.stopwatch.seconds
        _make_repeatable(experiment.seed, experiment.threads)
        with self.stopwatch("prepare"):
            inputs = prepare(experiment, record, self.ranks, self.folder)
            self.checkpoint = self._begin(inputs)
        self.tracking.start(experiment.name, record, self.folder)
        model, weights = self._open(inputs)
        if experiment.pruner is None and self.ranks.leads:
            note_dense(record, model, weights)
        self._measure("dense", model, weights, inputs)
        if experiment.pruner is not None:
            pattern = self._allocate(model, weights, inputs)
            masks = self._prune(model, weights, inputs, pattern)
            if experiment.steps:
                self._measure("pruned", model, weights, inputs)
            self._measure("rebuilt" if experiment.steps else "pruned", model, weights, inputs)
            self._export(weights, inputs, masks)
        note_block_errors(record, self.folder, experiment.name)
        log.info("Finished in %.0f s.", sum(self.stopwatch.seconds.values()))

    def clean_up(self) -> None:
        """Remove what nobody can use any more."""
        try:
            if self.checkpoint is not None and not self.checkpoint.num_finished:
                self.checkpoint.remove()
        except OSError as error:  # a full disk, which is not to hide what the run failed of
            log.warning("The checkpoint is not complete: %s", error)
        finally:
            if self.opened:
                shutil.rmtree(self.folder / SOURCE, ignore_errors=True)

    def discard(self) -> None:
        """Remove the finished layers, now that the record says success: until then the same command needs them."""
        try:
            if self.checkpoint is not None:
                self.checkpoint.remove()
        except OSError as error:
            log.warning("%s is of no use any more and cannot be removed: %s", self.folder / FOLDER, error)

    def _begin(self, inputs: Inputs) -> Checkpoint | None:
        """Where finished layers go; those of an interrupted run with the same settings are there already."""
        experiment, calibration, ranks = self.experiment, inputs.calibration, self.ranks
        keeps = inputs.streams or (experiment.export is not None and experiment.resume != "never")
        if ranks.leads:
            require_space(experiment, inputs, self.folder, keeps and calibration is not None)
        # Layers that are there already are used whether more are to be kept or not.
        if calibration is None or not (keeps or ranks.broadcast(holds_layers(self.folder))):
            return None
        source: Path | None = None
        num_layers = len(Decoder(inputs.skeleton).layers)
        if ranks.leads:
            facts = _facts_of_layers(self.record, calibration, inputs.tokenizer, ranks.size)
            source = begin(self.folder, facts, may_resume=experiment.resume != "never")
            if source is not None:
                drop_damaged(Checkpoint(self.folder / FOLDER, num_layers))
        folder = ranks.broadcast(self.folder)
        checkpoint = Checkpoint(folder / FOLDER, num_layers, ranks)
        if source is not None and (finished := checkpoint.num_finished):
            log.info("Going on with the interrupted run in %s: %d of %d layers are done.", source, finished, num_layers)
            self.record.resumed = Resumed(str(source), finished)
        return checkpoint

    def _open(self, inputs: Inputs) -> tuple[PreTrainedModel, Weights]:
        experiment, self.opened = self.experiment, True
        with self.stopwatch("load"), within("model"):
            times = times_of(experiment.model.files())
            model, weights = experiment.engine.open(experiment.model, inputs.streams, self.checkpoint, self.folder)
            check_numbers(model)
        if self.checkpoint is not None:
            with self.stopwatch("load"):
                looks_ahead = experiment.allocation is not None or getattr(experiment.pruner, "gradient", "") == "loss"
                reads = experiment.resume == "verify"
                require_the_same(self.checkpoint, weights, times, reads=reads, looks_ahead=looks_ahead)
        log.info("Loaded %s: %s parameters, %s.", experiment.model, f"{model.num_parameters():,}", model.dtype)
        return model, weights

    def _measure(self, stage: Stage, model: PreTrainedModel, weights: Weights, inputs: Inputs) -> None:
        """Measure a stage of the model, where the experiment asks for it."""
        if inputs.evaluation is None:
            return
        with self.stopwatch(f"evaluate {stage}"), display.progress() as progress, weights.showing(stage):

            def watch(what: str, steps: int) -> Callable[[int], None]:
                task = progress.add_task(what, total=steps)
                return lambda done: progress.advance(task, done)

            results = inputs.evaluation.measure(
                stage,
                model,
                inputs.device,
                watch,
                weights=weights,
                activations=self.experiment.engine.activations,
                scratch=self.folder,
            )
        if results:
            self.record.results[stage] = results
            self.record.write(self.folder)
            for line in display.findings(stage, results):
                log.info(line)

    def _allocate(self, model: PreTrainedModel, weights: Weights, inputs: Inputs) -> Pattern | Mapping[str, Pattern]:
        """The pattern of all linears, or of each where they are not all alike."""
        experiment, calibration = self.experiment, inputs.calibration
        if experiment.allocation is None:
            return of_the_rest(experiment.pattern, inputs.skeleton, inputs.left_out)
        assert calibration is not None and isinstance(experiment.pattern, Unstructured)
        allocating = Allocating(
            experiment.allocation,
            experiment.pattern,
            inputs.device,
            experiment.batch_size,
            experiment.precision,
            experiment.engine.activations,
            self.folder,
            inputs.left_out,
        )
        with self.stopwatch("allocate"), display.following("Allocating sparsity", self.ranks.leads) as advance:
            return allocating.carry_out(model, calibration.tokens_NL, weights, watch=advance)

    def _prune(
        self, model: PreTrainedModel, weights: Weights, inputs: Inputs, pattern: Pattern | Mapping[str, Pattern]
    ) -> dict[str, Tensor]:
        """Walk the decoder layers; returns the masks, if they are to be exported."""
        experiment, record, calibration = self.experiment, self.record, inputs.calibration
        assert experiment.pruner is not None and calibration is not None
        seqlen = calibration.tokens_NL.shape[1]
        batch_size = experiment.batch_size or fitting_batch_size(model.config, seqlen, inputs.device)
        kinds = tuple(arithmetic.kind for arithmetic in experiment.precision.on(inputs.device))
        record.machine = replace(record.machine, batch_size=batch_size, processes=self.ranks.size, precision=kinds)
        compares = bool(experiment.steps) and inputs.evaluation is not None and inputs.evaluation.reports("pruned")
        masks: dict[str, Tensor] = {}

        def on_layer(index: int, differences: dict[str, Difference]) -> None:
            if compares:
                weights.note(index, differences)
            if isinstance(experiment.export, MaskFile):
                experiment.export.collect(masks, differences)

        pruning = Pruning(
            pattern,
            experiment.pruner,
            list(experiment.steps.values()),
            inputs.device,
            batch_size,
            experiment.precision,
            experiment.schedule,
            experiment.engine.activations,
            self.folder,
        )
        with (
            self.stopwatch("walk"),
            initial_masks(experiment, record, inputs, model, weights, pattern, self.ranks) as initial,
            block_by_block(self.folder, model, self.tracking, self.ranks.leads) as on_block,
        ):
            reset_peak_memory()
            report = pruning.carry_out(
                model,
                calibration.tokens_NL,
                weights,
                self.checkpoint,
                initial,
                on_block,
                on_layer if compares or isinstance(experiment.export, MaskFile) else None,
            )
        record.resumed = record.resumed if report.num_resumed else None
        record.machine = replace(record.machine, peak_memory_bytes=peak_memory(inputs.device))
        self.ranks.barrier()  # no file of the checkpoint is removed while another process reads it
        note_report(record, self.folder, experiment, report, self.ranks.leads)
        return masks

    def _export(self, weights: Weights, inputs: Inputs, masks: dict[str, Tensor]) -> None:
        experiment, record = self.experiment, self.record
        if not self.ranks.leads or experiment.export is None or record.sparsity is None:
            return
        with self.stopwatch("export"):
            if isinstance(experiment.export, MaskFile):
                file = experiment.export.save(masks, self.folder)
                record.files["masks"] = file.name
                record.note_digest(file)
                return
            card = model_card(experiment, record, has_tokenizer=inputs.tokenizer is not None)
            record.files["model"] = experiment.export.save(weights, inputs.tokenizer, card, self.folder).name


def _facts_of_layers(
    record: RunRecord, calibration: CalibrationSet, tokenizer: PreTrainedTokenizerBase | None, processes: int
) -> dict[str, Any]:
    """What finished layers depend on, beside the weights."""
    return counting(record.config, "layers") | {
        "calibration_digest": calibration.digest,
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "processes": processes,
        "version": {name: record.versions[name] for name in ("torch", "transformers")},
    }


def _make_repeatable(seed: int, threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
