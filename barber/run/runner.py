"""One run, from an experiment to its record: check, load, measure, walk, measure again, write it all down."""

import json
import logging
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel

from barber.api import BlockReport, Report, allocate, fitting_batch_size, prune
from barber.errors import BarberError, within
from barber.evals.cache import ResultCache
from barber.methods.patterns import Pattern, Unstructured
from barber.model.checkpoint import FOLDER, Checkpoint, Difference, begin, holds_layers, require_idle
from barber.model.decoder import Decoder
from barber.model.engine import SOURCE
from barber.model.sources import skeleton
from barber.model.weights import Stage, Weights
from barber.run import display
from barber.run.experiment import Experiment
from barber.run.export import MaskFile, model_card
from barber.run.identity import counting, digest_of
from barber.run.plots import plot_block_errors, plot_losses
from barber.run.prepare import Inputs, prepare, prepare_evaluation
from barber.run.record import Initial, LinearCounts, Resumed, RunRecord, Sparsity
from barber.run.tracking import Tracking
from barber.runtime.distributed import Ranks, joined
from barber.runtime.memory import peak_memory, reset_peak_memory
from barber.runtime.tensors import Tensor
from barber.runtime.timing import Stopwatch
from barber.walk.initial import InitialMasks
from barber.walk.walk import BlockResult

log = logging.getLogger("barber")


def run(
    experiment: Experiment,
    config: dict[str, Any],
    overrides: list[str],
    folder: Path,
    choices: Mapping[str, str | None] | None = None,
) -> RunRecord:
    """Carry out an experiment; `folder` then holds its record, layers.jsonl, loss.png and what it exports.

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
        if not ranks.leads:
            _Run(experiment, record, Tracking(None), folder, ranks).help_along()
            return record
        require_idle(folder)
        record.write(folder)
        tracking = Tracking(experiment.tracker)
        run_ = _Run(experiment, record, tracking, folder, ranks)
        try:
            run_.carry_out()
            record.finish("success", folder)
        except torch.OutOfMemoryError as error:
            message = "out of memory on the device: a smaller batch_size or engine.activations=host needs less"
            record.error, record.traceback = message, traceback.format_exc()
            record.finish("failed", folder)
            raise BarberError(message) from error
        except BaseException as error:
            record.error = str(error) if isinstance(error, BarberError) else f"{type(error).__name__}: {error}"
            record.traceback = traceback.format_exc()
            record.finish("failed", folder)
            raise
        finally:
            run_.clean_up()
            tracking.finish(record)
    return record


@dataclass
class _Run:
    experiment: Experiment
    record: RunRecord
    tracking: Tracking
    folder: Path
    ranks: Ranks
    checkpoint: Checkpoint | None = None
    lock: IO[str] | None = None
    opened: bool = False
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def carry_out(self) -> None:
        experiment, record = self.experiment, self.record
        record.seconds = self.stopwatch.seconds
        if experiment.threads is not None:
            torch.set_num_threads(experiment.threads)
        _seed_everything(experiment.seed)
        with self.stopwatch("prepare"):
            inputs = prepare(self.experiment, self.record, self.ranks, self.folder)
            if experiment.evals is not None:
                inputs.evaluation = prepare_evaluation(experiment, experiment.evals, inputs, self.folder)
            checkpoint = self.checkpoint = self._begin(inputs)
        self.tracking.start(experiment.name, record, self.folder)
        model, weights = self._open(inputs, checkpoint)
        log.info("Loaded %s: %s parameters, %s.", experiment.model, f"{model.num_parameters():,}", model.dtype)
        self._evaluate("dense", model, weights, inputs)
        if experiment.pruner is not None:
            masks = self._prune(model, weights, inputs, checkpoint)
            if experiment.steps:
                self._evaluate("pruned", model, weights, inputs)
            self._evaluate("rebuilt" if experiment.steps else "pruned", model, weights, inputs)
            self._export(weights, inputs, masks)
        self._plot_block_errors()
        if checkpoint is not None:
            checkpoint.remove()
            self.checkpoint = None
        log.info("Finished in %.0f s.", sum(self.stopwatch.seconds.values()))

    def clean_up(self) -> None:
        """Remove what nobody can use any more, and let others have the run folder."""
        try:
            if self.checkpoint is not None and not self.checkpoint.num_finished:
                self.checkpoint.remove()
        except OSError as error:  # a full disk, which is not to hide what the run failed of
            log.warning("The checkpoint is not complete: %s", error)
        finally:
            if self.lock is not None:
                self.lock.close()
            if self.opened:
                shutil.rmtree(self.folder / SOURCE, ignore_errors=True)

    def help_along(self) -> None:
        """Walk with this process's share of the samples; all else is done by the process that leads."""
        _seed_everything(self.experiment.seed)
        inputs = prepare(self.experiment, self.record, self.ranks, self.folder)
        checkpoint = self._begin(inputs)
        model, weights = self._open(inputs, checkpoint)
        if self.experiment.pruner is not None:
            self._prune(model, weights, inputs, checkpoint)

    def _open(self, inputs: Inputs, checkpoint: Checkpoint | None) -> tuple[PreTrainedModel, Weights]:
        experiment, self.opened = self.experiment, True
        with self.stopwatch("load"), within("model"):
            return experiment.engine.open(experiment.model, inputs.streams, checkpoint, self.folder)

    def _begin(self, inputs: Inputs) -> Checkpoint | None:
        """Where finished layers go; those of an interrupted run with the same settings are there already."""
        experiment, calibration = self.experiment, inputs.calibration
        keeps = inputs.streams or (experiment.export is not None and experiment.resume == "auto")
        # Layers that are there already are used whether more are to be kept or not.
        if calibration is None or not (keeps or self.ranks.told(holds_layers(self.folder))):
            return None
        if self.ranks.leads:
            facts = counting(self.record.config, "layers")
            versions = {name: self.record.versions[name] for name in ("torch", "transformers")}
            facts |= {"calibration_digest": calibration.digest, "processes": self.ranks.size, "version": versions}
            self.lock, source = begin(self.folder, facts, may_resume=experiment.resume == "auto")
        folder = self.ranks.told(self.folder)
        num_layers = len(Decoder(skeleton(experiment.model.config())).layers)
        checkpoint = Checkpoint(folder / FOLDER, num_layers, self.ranks)
        if self.ranks.leads and source is not None:
            finished = checkpoint.num_finished
            log.info("Going on with the interrupted run in %s: %d of %d layers are done.", source, finished, num_layers)
            self.record.resumed = Resumed(str(source), finished)
        return checkpoint

    def _evaluate(self, stage: Stage, model: PreTrainedModel, weights: Weights, inputs: Inputs) -> None:
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

    def _prune(
        self, model: PreTrainedModel, weights: Weights, inputs: Inputs, checkpoint: Checkpoint | None
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

        patterns = self._allocate(model, weights, inputs, batch_size)
        with (
            self.stopwatch("walk"),
            self._initial_masks(model, weights, inputs, batch_size, patterns) as initial,
            self._telling_of_blocks(len(Decoder(model).layers)) as on_block,
        ):
            weights.restore()
            reset_peak_memory()
            report = prune(
                model,
                calibration.tokens_NL,
                pattern=experiment.pattern,
                pruner=experiment.pruner,
                rebuild=list(experiment.steps.values()),
                device=inputs.device,
                batch_size=batch_size,
                precision=experiment.precision,
                schedule=experiment.schedule,
                activations=experiment.engine.activations,
                scratch=self.folder,
                weights=weights,
                checkpoint=checkpoint,
                initial=initial,
                patterns=patterns,
                on_block=on_block,
                on_layer=on_layer if compares or isinstance(experiment.export, MaskFile) else None,
            )
            if initial is not None and not initial.complete and record.resumed is None:
                initial.took(report.initial_seconds)
                record.initial = Initial(known=False, seconds=report.initial_seconds)
        record.machine = replace(record.machine, peak_memory_bytes=peak_memory(inputs.device))
        self.ranks.meet()  # no file of the checkpoint is removed while another process reads it
        if self.ranks.leads:
            self._note(report)
        return masks

    @contextmanager
    def _telling_of_blocks(self, num_layers: int) -> Iterator[Callable[[BlockReport, BlockResult | None], None]]:
        """What every finished block is told to: layers.jsonl, the log, the progress bar, the tracker."""
        # The other processes of the run have no lines to write and nobody who watches.
        path = self.folder / "layers.jsonl" if self.ranks.leads else Path(os.devnull)
        numbers = count(1)
        with display.progress(visible=self.ranks.leads) as progress, path.open("w", encoding="utf-8") as lines:
            task = progress.add_task("Pruning, block by block", total=2 * num_layers)

            def on_block(block: BlockReport, result: BlockResult | None) -> None:
                lines.write(json.dumps(asdict(block)) + "\n")
                lines.flush()
                if result is not None:
                    log.info(display.describe(block, num_layers))
                self.tracking.block(next(numbers), block)
                progress.advance(task)

            yield on_block

    def _allocate(
        self, model: PreTrainedModel, weights: Weights, inputs: Inputs, batch_size: int
    ) -> Mapping[str, Pattern]:
        """The patterns of the linears, where they are not all alike."""
        experiment, calibration = self.experiment, inputs.calibration
        if experiment.allocation is None:
            return {}
        assert calibration is not None and isinstance(experiment.pattern, Unstructured)
        with (
            self.stopwatch("allocate"),
            display.progress(visible=self.ranks.leads) as progress,
            weights.showing("dense"),
        ):
            task = progress.add_task("Allocating sparsity", total=None)
            return allocate(
                model,
                calibration.tokens_NL,
                allocation=experiment.allocation,
                pattern=experiment.pattern,
                device=inputs.device,
                batch_size=batch_size,
                precision=experiment.precision,
                activations=experiment.engine.activations,
                scratch=self.folder,
                weights=weights,
                watch=lambda done, total: progress.update(task, completed=done, total=total),
            )

    @contextmanager
    def _initial_masks(
        self,
        model: PreTrainedModel,
        weights: Weights,
        inputs: Inputs,
        batch_size: int,
        patterns: Mapping[str, Pattern],
    ) -> Iterator[InitialMasks | None]:
        """The initial masks that other runs have kept, or a place to keep them for others.

        None where they are cheap, and where several processes need not share a disk.
        """
        experiment = self.experiment
        cache, pruner, calibration = experiment.cache, experiment.pruner, inputs.calibration
        interleaves = experiment.schedule == "interleaved" and bool(experiment.steps)
        if cache is None or pruner is None or pruner.statistic is None or interleaves or self.ranks.size > 1:
            yield None
            return
        assert calibration is not None
        dense = inputs.evaluation.dense if inputs.evaluation is not None else None
        with weights.showing("dense"):
            facts = (dense or ResultCache(cache, model, inputs.device, weights)).facts
        facts = facts | {"calibration": calibration.digest, "pruner": repr(pruner), "pattern": repr(experiment.pattern)}
        facts |= {"precision": self.record.machine.precision, "batch_size": batch_size}
        facts |= {"patterns": {name: str(one) for name, one in patterns.items()}} if patterns else {}
        entry = cache.entry("initial", facts)
        with entry.opened("the initial masks") as complete:
            if complete:
                log.info("The initial masks are known from another run.")
            masks = InitialMasks(entry.folder, complete)
            self.record.initial = Initial(known=complete, seconds=masks.seconds)
            yield masks
            if not complete and masks.has_all(len(Decoder(model).layers)):
                entry.complete()

    def _note(self, report: Report) -> None:
        self.record.walk_seconds = report.seconds
        self.record.linears = {name: LinearCounts(**counts) for name, counts in report.linears.items()}
        self.record.sparsity = Sparsity(report.sparsity, report.zeros, report.weights, report.exchanges)
        self.record.write(self.folder)
        if self.experiment.steps:
            plot_losses(report.blocks, self.experiment.name, self.folder / "loss.png")
            self.record.files["loss"] = "loss.png"

    def _plot_block_errors(self) -> None:
        errors = {
            stage: {text: result.block_errors for text, result in results.agreement.items()}
            for stage, results in self.record.results.items()
            if results.agreement
        }
        if errors:
            plot_block_errors(errors, self.experiment.name, self.folder / "block_errors.png")
            self.record.files["blocks"] = "block_errors.png"

    def _export(self, weights: Weights, inputs: Inputs, masks: dict[str, Tensor]) -> None:
        export, record, folder = self.experiment.export, self.record, self.folder
        if export is None or record.sparsity is None:
            return
        with self.stopwatch("export"):
            if isinstance(export, MaskFile):
                record.files["masks"] = export.save(masks, folder).name
                return
            card = model_card(
                name=self.experiment.name,
                base=str(self.experiment.model),
                pattern=str(self.experiment.pattern),
                sparsity=record.sparsity,
                config_yaml=yaml.safe_dump(record.config, sort_keys=False),
                update=", ".join(type(step).__name__ for step in (self.experiment.update or {}).values()),
            )
            record.files["model"] = export.save(weights, inputs.tokenizer, card, folder).name


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
