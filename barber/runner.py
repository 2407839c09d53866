"""One run, from an experiment to its record: check, load, measure, walk, measure again, write it all down."""

import json
import logging
import platform
import random
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber import display
from barber.api import BlockReport, Report, fitting_batch_size, prune
from barber.calibration import Calibration, CalibrationSet, TokenSamples, save_samples
from barber.checks import check_architecture, check_methods, check_tokens, resolve_device
from barber.decoder import Decoder
from barber.errors import BarberError, UserError, within
from barber.evals import Evaluation, Prepared, Stage
from barber.export import HuggingFaceFolder, MaskFile, model_card
from barber.families import family_of
from barber.models import ModelSource, skeleton
from barber.patterns import Pattern
from barber.plots import plot_block_errors, plot_losses
from barber.pruners import Pruner
from barber.rebuild import Barber
from barber.record import RunRecord
from barber.stages import PrunedStage
from barber.tensors import Tensor
from barber.texts import TokenFile
from barber.tracking import Tracker, Tracking
from barber.walk import BlockResult, Stopwatch

log = logging.getLogger("barber")


@dataclass(frozen=True)
class Experiment:
    """Everything a run consists of; a component that is None is left out.

    Args:
        name: what people call it.
        device: `auto`, `cpu`, `cuda` or `cuda:INDEX`.
        batch_size: samples that go through a layer together; None: as many as fit comfortably.
        seed: of everything random that has no seed of its own.
    """

    name: str
    model: ModelSource
    pattern: Pattern
    calibration: Calibration
    pruner: Pruner | None
    rebuild: Barber | None
    evals: Evaluation | None
    tracker: Tracker | None
    export: HuggingFaceFolder | MaskFile | None
    seed: int = 0
    device: str = "auto"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"must be at least 1, not {self.batch_size}", field="batch_size")


@dataclass
class Inputs:
    """What a run works on, checked before any weight is read."""

    device: torch.device
    tokenizer: PreTrainedTokenizerBase | None
    calibration: CalibrationSet | None
    evaluation: Prepared | None


def run(experiment: Experiment, config: dict[str, Any], overrides: list[str], folder: Path) -> RunRecord:
    """Carry out an experiment; `folder` then holds its record, layers.jsonl, loss.png and what it exports.

    Args:
        config: the resolved config, for the record and the model card.
        overrides: the command line's share in it.

    Raises:
        BarberError: the run failed; the record says so too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(config, overrides)
    record.write(folder)
    tracking = Tracking(experiment.tracker)
    try:
        _Run(experiment, record, tracking, folder).carry_out()
        record.finish("success", folder)
    except BaseException as error:
        record.error = str(error) if isinstance(error, BarberError) else f"{type(error).__name__}: {error}"
        record.traceback = traceback.format_exc()
        record.finish("failed", folder)
        raise
    finally:
        tracking.finish(record)
    return record


@dataclass
class _Run:
    experiment: Experiment
    record: RunRecord
    tracking: Tracking
    folder: Path
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def carry_out(self) -> None:
        experiment, record = self.experiment, self.record
        record.seconds = self.stopwatch.seconds
        _seed_everything(experiment.seed)
        with self.stopwatch("prepare"):
            inputs = self._prepare()
        self.tracking.start(experiment.name, record.config, self.folder)
        with self.stopwatch("load"), within("model"):
            model = experiment.model.load()
        log.info("Loaded %s: %s parameters, %s.", experiment.model, f"{model.num_parameters():,}", model.dtype)
        self._evaluate("dense", model, inputs)
        if experiment.pruner is not None:
            stage, masks = self._prune(model, inputs)
            if experiment.rebuild is None:
                self._evaluate("pruned", model, inputs)
            else:
                if stage is not None:
                    with stage.in_place(model):
                        self._evaluate("pruned", model, inputs)
                self._evaluate("rebuilt", model, inputs)
            self._export(model, inputs, masks)
        self._plot_block_errors()
        log.info("Finished in %.0f s.", sum(self.stopwatch.seconds.values()))

    def _prepare(self) -> Inputs:
        """Check all there is to check and read what is cheap: config, tokenizer, texts."""
        experiment, record = self.experiment, self.record
        check_methods(experiment.pattern, experiment.pruner, experiment.rebuild)
        if experiment.tracker is not None:
            experiment.tracker.check()
        if experiment.export is not None:
            experiment.export.check(self.folder)
        device = resolve_device(experiment.device)
        with within("model"):
            config = experiment.model.config()
        family_of(config)  # before transformers builds the model: of others it has warnings and errors of its own
        check_architecture(skeleton(config), experiment.pattern)
        with within("model"):
            tokenizer = experiment.model.tokenizer()
        record.machine = {"device": str(device), "threads": torch.get_num_threads(), "platform": platform.platform()}
        if device.type == "cuda":
            record.machine["gpu"] = torch.cuda.get_device_name(device)
        record.seeds = {"run": experiment.seed}
        inputs = Inputs(device, tokenizer, None, None)
        if experiment.pruner is not None:
            with within("calibration"):
                inputs.calibration = experiment.calibration.sample(tokenizer)
            from_file = isinstance(experiment.calibration, TokenSamples)
            keys = ("calibration.path",) if from_file else ("calibration", "calibration.seqlen")
            check_tokens(inputs.calibration.tokens_NL, config, *keys)
            if experiment.calibration.save is not None:
                with within("calibration"):
                    save_samples(inputs.calibration, Path(experiment.calibration.save))
            self._note_calibration(inputs.calibration)
        if experiment.evals is not None:
            with within("evals"):
                inputs.evaluation = experiment.evals.prepare(tokenizer, self.folder / "tasks")
            for name, windows in inputs.evaluation.windows.items():
                key = f"evals.texts.{name}" + (".path" if isinstance(experiment.evals.texts[name], TokenFile) else "")
                check_tokens(windows.tokens_NL, config, key, "evals.seqlen")
                num, seqlen = windows.tokens_NL.shape
                log.info("Evaluation on %s: %d windows of %d tokens from %s.", name, num, seqlen, windows.source)
        return inputs

    def _note_calibration(self, calibration: CalibrationSet) -> None:
        samples, seqlen = calibration.tokens_NL.shape
        self.record.seeds["calibration"] = calibration.seed
        self.record.calibration = {
            "source": calibration.source,
            "samples": samples,
            "seqlen": seqlen,
            "digest": calibration.digest,
        }
        log.info("Calibration: %d samples of %d tokens from %s.", samples, seqlen, calibration.source)

    def _evaluate(self, stage: Stage, model: PreTrainedModel, inputs: Inputs) -> None:
        """Measure a stage of the model, where the experiment asks for it."""
        if inputs.evaluation is None:
            return
        with self.stopwatch(f"evaluate {stage}"), display.progress() as progress:

            def watch(what: str, steps: int) -> Callable[[int], None]:
                task = progress.add_task(what, total=steps)
                return lambda done: progress.advance(task, done)

            results = inputs.evaluation.measure(stage, model, inputs.device, watch)
        if results:
            self.record.results[stage] = results
            self.record.write(self.folder)
            for line in display.findings(stage, results):
                log.info(line)

    def _prune(self, model: PreTrainedModel, inputs: Inputs) -> tuple[PrunedStage | None, dict[str, Tensor]]:
        """Walk the decoder layers; returns the pruned stage if it is to be measured, and the masks to be exported."""
        experiment, record, calibration = self.experiment, self.record, inputs.calibration
        assert experiment.pruner is not None and calibration is not None
        seqlen = calibration.tokens_NL.shape[1]
        batch_size = experiment.batch_size or fitting_batch_size(model.config, seqlen, inputs.device)
        record.machine["batch_size"] = batch_size
        compares = (
            experiment.rebuild is not None and inputs.evaluation is not None and inputs.evaluation.reports("pruned")
        )
        stage = PrunedStage() if compares else None
        masks: dict[str, Tensor] = {}
        num_layers = len(Decoder(model).layers)
        blocks: list[BlockReport] = []
        with (
            self.stopwatch("walk"),
            display.progress() as progress,
            (self.folder / "layers.jsonl").open("w", encoding="utf-8") as lines,
        ):
            task = progress.add_task("Pruning, block by block", total=2 * num_layers)

            def on_block(block: BlockReport, result: BlockResult) -> None:
                blocks.append(block)
                lines.write(json.dumps(asdict(block)) + "\n")
                lines.flush()
                log.info(display.describe(block, num_layers))
                self.tracking.block(len(blocks), block)
                for linear in result.linears:
                    if stage is not None:
                        stage.collect(linear)
                    if isinstance(experiment.export, MaskFile):
                        experiment.export.collect(masks, linear)
                progress.advance(task)

            report = prune(
                model,
                calibration.tokens_NL,
                pattern=experiment.pattern,
                pruner=experiment.pruner,
                rebuild=experiment.rebuild,
                device=inputs.device,
                batch_size=batch_size,
                on_block=on_block,
            )
        self._note(report)
        return stage, masks

    def _note(self, report: Report) -> None:
        self.record.walk_seconds = report.seconds
        self.record.linears = report.linears
        self.record.sparsity = {
            "sparsity": report.sparsity,
            "zeros": report.zeros,
            "weights": report.weights,
            "exchanges": report.exchanges,
        }
        self.record.write(self.folder)
        if self.experiment.rebuild is not None:
            plot_losses(report.blocks, self.experiment.name, self.folder / "loss.png")
            self.record.files["loss"] = "loss.png"

    def _plot_block_errors(self) -> None:
        errors = {
            stage: {text: result["block_errors"] for text, result in results["agreement"].items()}
            for stage, results in self.record.results.items()
            if "agreement" in results
        }
        if errors:
            plot_block_errors(errors, self.experiment.name, self.folder / "block_errors.png")
            self.record.files["blocks"] = "block_errors.png"

    def _export(self, model: PreTrainedModel, inputs: Inputs, masks: dict[str, Tensor]) -> None:
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
            )
            record.files["model"] = export.save(model, inputs.tokenizer, card, folder).name


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
