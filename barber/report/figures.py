"""Figures of a report, as PNG and SVG. Each is drawn only where what it shows varies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from barber.report.perplexities import by_granularity, over_alpha, over_sparsity, pareto
from barber.report.points import Point, comparable
from barber.report.table import primary_text
from barber.report.walks import block_losses, exchanges, time_and_memory


@dataclass(frozen=True)
class Picture:
    """A figure that was written.

    Args:
        name: of the files, without ending.
        caption: what it shows, in a sentence or two.
    """

    name: str
    caption: str
    png: Path
    svg: Path


def draw(points: Sequence[Point], folder: Path) -> list[Picture]:
    """Every figure for which there are data."""
    text = primary_text(points)
    of_one_protocol = comparable(points, text) if text else []
    figures: list[tuple[str, str, Figure | None]] = []
    if text:
        figures = [
            ("sparsity", *over_sparsity(of_one_protocol, text)),
            ("alpha", *over_alpha(of_one_protocol, text)),
            ("granularity", *by_granularity(of_one_protocol, text)),
            ("pareto", *pareto(of_one_protocol, text)),
        ]
    figures += [
        ("time_and_memory", *time_and_memory(points)),
        ("block_losses", *block_losses(points)),
        ("exchanges", *exchanges(points)),
    ]
    return [_write(figure, name, caption, folder) for name, caption, figure in figures if figure is not None]


def _write(figure: Figure, name: str, caption: str, folder: Path) -> Picture:
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=200)
    figure.savefig(svg, metadata={"Date": None})
    return Picture(name, caption, png, svg)
