"""What a walk and a comparison have found, into the record and as pictures beside it."""

from pathlib import Path

from barber.run.plots import plot_block_errors, plot_losses
from barber.run.record import LinearCounts, RunRecord, Sparsity
from barber.run.watching import LAYERS
from barber.walk.report import Report


def note_report(record: RunRecord, folder: Path, name: str, report: Report, plots: bool, leads: bool) -> None:
    """The figures of a walk.

    Args:
        folder: of the run.
        name: of the run, for the picture.
        plots: whether there are losses to draw.
        leads: whether this process writes.
    """
    record.walk_seconds = report.seconds
    record.linears = {linear: LinearCounts(**counts) for linear, counts in report.linears.items()}
    overall = report.overall_sparsity if report.left_out else None
    record.sparsity = Sparsity(report.sparsity, report.zeros, report.weights, report.exchanges, overall)
    if not leads:
        return
    record.note_digest(folder / LAYERS)
    record.write(folder)
    if plots:
        plot_losses(report.blocks, name, folder / "loss.png")
        record.files["loss"] = "loss.png"


def note_block_errors(record: RunRecord, folder: Path, name: str) -> None:
    """The distance of every block from the dense model, where it was measured."""
    errors = {
        stage: {text: result.block_errors for text, result in results.agreement.items()}
        for stage, results in record.results.items()
        if results.agreement
    }
    if errors:
        plot_block_errors(errors, name, folder / "block_errors.png")
        record.files["blocks"] = "block_errors.png"
