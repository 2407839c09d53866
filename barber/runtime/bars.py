"""Bars that show how far something is, in a terminal and in a notebook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from barber.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Advance = Callable[[int, int | None], None]


def bars(console: "Console | None" = None, visible: bool = True) -> "Progress":
    """Bars with the share done, the time spent and the time left, which are gone when all is done.

    Raises:
        UserError: rich is not installed, which nothing else below the command line needs.
    """
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError as error:
        raise UserError(
            "needs rich, which is not installed: pip install rich, or leave progress out", "progress"
        ) from error
    columns = (TextColumn("{task.description:<24}", markup=False), BarColumn(), MofNCompleteColumn())
    left = (Elapsed(), TextColumn("left"), Remaining())
    return Progress(*columns, *left, console=console, transient=True, disable=not visible)


@contextmanager
def following(what: str, visible: bool, console: "Console | None" = None) -> Iterator[Advance]:
    """A bar for one thing, and the function that it is told by how much is done, and of how much."""
    if not visible:
        yield lambda done, total: None
        return
    with bars(console) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
