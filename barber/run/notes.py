"""What a walk and a comparison have found, into the record and as pictures beside it."""

import logging
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel

from barber.model.decoder import Decoder
from barber.model.weights import Weights
from barber.run.effects import without_effect
from barber.run.experiment import Experiment
from barber.run.plots import plot_block_errors, plot_losses
from barber.run.record import LinearCounts, RunRecord, Sparsity, Zeros
from barber.run.watching import LAYERS
from barber.walk.report import Report

log = logging.getLogger("barber")


def note_dense(record: RunRecord, model: PreTrainedModel, weights: Weights) -> None:
    """The zeros of a model that no walk will go through."""
    zeros = total = 0
    for index, layer in enumerate(Decoder(model).layers):
        tensors = weights.dense(index)
        for linear in layer.linears:
            weight = tensors[f"{linear.name}.weight"]
            zeros += int((weight == 0).sum())
            total += weight.numel()
    record.zeros["dense"] = Zeros(zeros, total)


def note_report(record: RunRecord, folder: Path, experiment: Experiment, report: Report, leads: bool) -> None:
    """The figures of a walk, and what it was asked for in vain.

    Args:
        folder: of the run.
        leads: whether this process writes.
    """
    record.walk_seconds = report.seconds
    record.linears = {linear: LinearCounts(**counts) for linear, counts in report.linears.items()}
    overall = report.overall_sparsity if report.left_out else None
    record.sparsity = Sparsity(report.sparsity, report.zeros, report.weights, report.exchanges, overall)
    record.zeros = dict(_zeros_by_stage(report, "rebuilt" if experiment.steps else "pruned"))
    if not leads:
        return
    record.note_digest(folder / LAYERS)
    record.write(folder)
    if sentence := without_effect(experiment, report):
        log.warning("%s", sentence)
    if any(block.loss_before or block.loss_after for block in report.blocks):
        plot_losses(report.blocks, experiment.name, folder / "loss.png")
        record.files["loss"] = "loss.png"


def note_block_errors(record: RunRecord, folder: Path, name: str) -> None:
    """The distance of every block from the dense model, where it was measured."""
    errors = {
        stage: {text: result.block_errors for text, result in results.agreement.items()}
        for stage, results in record.results.items()
        if results.agreement
    }
    if any(found for by_text in errors.values() for blocks in by_text.values() for found in blocks.values()):
        plot_block_errors(errors, name, folder / "block_errors.png")
        record.files["blocks"] = "block_errors.png"


def _zeros_by_stage(report: Report, last: str) -> Iterator[tuple[str, Zeros]]:
    """What was counted; layers that an earlier version finished have the last stage's zeros only."""
    every = [*report.linears.values(), *report.left_out.values()]
    weights = sum(counts["weights"] for counts in every)
    for stage, key in {"dense": "dense_zeros", "pruned": "pruned_zeros", last: "zeros"}.items():
        if all(key in counts for counts in every):
            yield stage, Zeros(sum(counts[key] for counts in every), weights)
