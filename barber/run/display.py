"""What people see of a run: log lines, progress bars with the time left, a table at the end."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from barber.errors import DiskError
from barber.evals.results import PerplexityResult, StageResults, TaskResult, ZeroShotResult
from barber.run.record import FILE, RunRecord
from barber.runtime import bars
from barber.runtime.bars import Advance
from barber.runtime.files import writing
from barber.walk.report import BlockReport

console = Console(highlight=False)


class ConsoleHandler(logging.Handler):
    """Log lines on the same console as the progress bars, so that neither tears the other."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, soft_wrap=True)


class LogFile(logging.FileHandler):
    """run.log. A disk that takes no line of it ends the run; after that it is silent, for the run has to end."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", delay=True)
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if self._failed:
            return
        try:
            with writing(Path(self.baseFilename)):
                super().emit(record)
        except DiskError:
            self._failed = True
            self.stream = None  # what is left of the line would fail again
            raise

    def handleError(self, record: logging.LogRecord) -> None:
        """It is called where the error is at hand."""
        raise


def progress(visible: bool = True) -> Progress:
    """Bars that show the share done, the time spent and the time left; nothing where the output is no terminal."""
    return bars.bars(console, visible and console.is_terminal)


def following(what: str, visible: bool) -> AbstractContextManager[Advance]:
    """A bar for one thing, see `barber.runtime.bars`."""
    return bars.following(what, visible and console.is_terminal, console)


def describe(block: BlockReport, num_layers: int) -> str:
    """A block's log line."""
    place = f"layer {block.layer:>{len(str(num_layers))}} of {num_layers} {block.block:<9}"
    if not block.linears:
        return f"{place}  left dense, {block.seconds:.1f} s"
    parts = [f"{block.sparsity:.2%} zeros"]
    if block.loss_before is not None and block.loss_after is not None:
        change = f" ({block.loss_after / block.loss_before - 1:+.0%})" if block.loss_before else ""
        parts += [
            f"{block.exchanges:,} pairs exchanged",
            f"block error {block.loss_before:.3g} -> {block.loss_after:.3g}{change}",
        ]
    return f"{place}  {', '.join(parts)}, {block.seconds:.1f} s"


def findings(stage: str, results: StageResults) -> Iterator[str]:
    """What was measured of a stage of the model, a log line each."""
    for text, result in results.perplexity.items():
        yield f"Perplexity of the {stage} model on {text}: {_perplexity(result)}.{_known(result)}"
    for text, compared in results.agreement.items():
        yield (
            f"The {stage} model against the dense one on {text}: KL divergence {compared.kl_divergence:.4f}, "
            f"the same likeliest token at {compared.top1_agreement:.1%} of the positions."
        )
    if found := results.zero_shot:
        tasks = ", ".join(f"{name} {_accuracy(task)}" for name, task in found.tasks.items())
        yield f"Accuracy of the {stage} model, {tasks}{_limited(found)}.{_known(found)}"
    if sample := results.sample:
        yield f"The {stage} model goes on: {sample.prompt + sample.text!r}"


def headline(results: Mapping[str, StageResults]) -> str:
    """The last stage's perplexities, or its accuracy, in a few words."""
    last = results.get("rebuilt") or results.get("pruned") or results.get("dense") or StageResults()
    figures = [f"{text} {_perplexity(result)}" for text, result in last.perplexity.items()]
    if last.zero_shot is not None and last.zero_shot.mean_acc is not None:
        figures.append(f"acc {last.zero_shot.mean_acc:.2%}")
    return ", ".join(figures)


def show(record: RunRecord, folder: Path) -> None:
    """The end of a run: a short table, and where everything is."""
    has_steps = record.config.get("rebuild") or record.config.get("update")
    last = "dense" if record.sparsity is None else "rebuilt" if has_steps else "pruned"
    columns = {stage: _cells(results) for stage, results in record.results.items()} or {last: {}}
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column()
    for stage in columns:
        table.add_column(stage, justify="right")
    table.add_row("zeros", *(_zeros(record, stage, last) for stage in columns))
    for row in dict.fromkeys(row for cells in columns.values() for row in cells):
        table.add_row(Text(row), *(cells.get(row, "") for cells in columns.values()))
    console.print()
    console.print(table)
    for note in _notes(record):
        console.print(note, markup=False, soft_wrap=True)
    console.print()
    for what, path in (("record", FILE), *record.files.items()):
        console.print(f"{what:<8} {folder / path}", markup=False, soft_wrap=True)


def _zeros(record: RunRecord, stage: str, last: str) -> str:
    """The share that was counted; older records know that of the last stage alone."""
    if counted := record.zeros.get(stage):
        return f"{counted.share:.2%}"
    return f"{record.sparsity.sparsity:.2%}" if record.sparsity and stage == last else "-"


def _cells(results: StageResults) -> dict[str, str]:
    """A stage's column, by row."""
    cells = {f"perplexity, {text}": _perplexity(result) for text, result in results.perplexity.items()}
    for text, result in results.agreement.items():
        cells[f"KL divergence, {text}"] = f"{result.kl_divergence:.4f}"
        cells[f"same top token, {text}"] = f"{result.top1_agreement:.1%}"
    if found := results.zero_shot:
        star = "*" if found.limit else ""
        cells |= {f"acc{star}, {name}": _accuracy(task) for name, task in found.tasks.items()}
        if found.mean_acc is not None:
            cells[f"acc{star}, mean"] = f"{found.mean_acc:.2%}"
    return cells


def _notes(record: RunRecord) -> Iterator[str]:
    """What has to be said under the table for nobody to misread it."""
    if record.sparsity is not None and record.sparsity.overall is not None:
        yield f"zeros of what was pruned; of all linears of the decoder layers {record.sparsity.overall:.2%} (skip)"
    if limit := next((found.limit for one in record.results.values() if (found := one.zero_shot)), None):
        yield f"* only the first {limit} documents of every task: not comparable with published figures"
    measured = [found for one in record.results.values() for found in one.perplexity.values()]
    if any(found.protocol.max_windows for found in measured):
        most = max(found.windows for found in measured)
        yield f"perplexity on the first {most} windows of a text at most (evals.max_windows)"
    if (drawn := record.calibration) and drawn.repeats:
        yield f"calibrated on {drawn}"


def _perplexity(result: PerplexityResult) -> str:
    """With its standard error over windows."""
    if result.perplexity is None:
        return "beyond 1e304"
    error = result.perplexity_standard_error
    return f"{result.perplexity:,.2f}" + (f" ± {error:,.2f}" if error is not None else "")


def _accuracy(task: TaskResult) -> str:
    """With its standard error over documents."""
    if task.acc is None:
        return "-"
    error = task.metrics.get("acc_stderr")
    return f"{task.acc:.2%}" + (f" ± {error:.2%}" if error is not None else "")


def _limited(found: ZeroShotResult) -> str:
    mean = "" if found.mean_acc is None else f", mean {found.mean_acc:.2%}"
    return mean + (f" (ONLY THE FIRST {found.limit} DOCUMENTS of every task)" if found.limit else "")


def _known(result: PerplexityResult | ZeroShotResult) -> str:
    return f" (known since {result.cached})" if result.cached is not None else ""
