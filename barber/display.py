"""What people see of a run: log lines, progress bars with the time left, a table at the end."""

import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from barber.api import BlockReport
from barber.record import FILE, RunRecord

console = Console(highlight=False)


class ConsoleHandler(logging.Handler):
    """Log lines on the same console as the progress bars, so that neither tears the other."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, soft_wrap=True)


def progress() -> Progress:
    """Bars that show the share done, the time spent and the time left; nothing where the output is no terminal."""
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def describe(block: BlockReport, num_layers: int) -> str:
    """A block's log line."""
    place = f"layer {block.layer:>{len(str(num_layers))}} of {num_layers} {block.block:<9}"
    parts = [f"{block.sparsity:.2%} zeros"]
    if block.loss_before is not None and block.loss_after is not None:
        change = f" ({block.loss_after / block.loss_before - 1:+.0%})" if block.loss_before else ""
        parts += [
            f"{block.exchanges:,} pairs exchanged",
            f"block error {block.loss_before:.3g} -> {block.loss_after:.3g}{change}",
        ]
    return f"{place}  {', '.join(parts)}, {block.seconds:.1f} s"


def perplexity(result: dict[str, Any]) -> str:
    """A perplexity as people write it."""
    value = result["perplexity"]
    return "beyond 1e304" if value is None else f"{value:,.2f}"


def show(record: RunRecord, folder: Path) -> None:
    """The end of a run: a short table, and where everything is."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("model")
    table.add_column("zeros", justify="right")
    table.add_column("perplexity", justify="right")
    sparsity = record.sparsity["sparsity"] if record.sparsity else 0.0
    measured: dict[str, Any] = record.results.get("perplexity", {})
    last = "dense" if record.sparsity is None else "rebuilt" if record.config.get("rebuild") else "pruned"
    for stage in list(measured) or [last]:
        zeros = f"{0.0 if stage == 'dense' else sparsity:.2%}"
        table.add_row(stage, zeros, perplexity(measured[stage]) if stage in measured else "-")
    console.print()
    console.print(table)
    console.print()
    for what, path in (("record", FILE), *record.files.items()):
        console.print(f"{what:<8} {folder / path}", markup=False, soft_wrap=True)
