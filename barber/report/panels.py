"""What the figures have in common: colours, panels, labels."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from barber.report.points import Point
from barber.report.table import short
from barber.run.curves import coinciding

# Okabe and Ito's colours, to be told apart by everybody; the yellow is too light for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
Key = TypeVar("Key")
PANELS = 6  # at most in a figure
# A salt makes the ids in an SVG, and so the file, the same in every run.
matplotlib.rcParams.update({"svg.hashsalt": "barber", "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8})


@dataclass(frozen=True)
class Group:
    """Points that one panel compares: of one model, text and protocol."""

    title: str
    points: Sequence[Point]


def panels(
    groups: Sequence[Group],
    panel: Callable[[Axes, Group], None],
    text: str = "",
    ylabel: str = "",
    share_y: bool = False,
    legend: Literal["lines", "columns", "one"] = "columns",
    below: float = 0.0,
) -> Figure | None:
    """Small multiples: at most six groups, a panel each.

    Args:
        legend: below each panel in one column or in two, or one for all.
        below: inches that a panel's own notes below the axes take.
    """
    groups = groups[:PANELS]
    if not groups:
        return None
    rows = -(-len(groups) // 3)
    columns = -(-len(groups) // rows)  # four stand two by two
    height = (2.9 if legend == "one" else 3.4) + below
    figure = empty(1 + 3.4 * columns if columns > 1 else 5.5, height * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    for axes, group in zip(grid.flat, groups, strict=False):
        panel(axes, group)
        if text:
            _perplexity_scale(axes, [point.perplexity[text].mean for point in group.points])
        axes.grid(True, which="major", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        handles, names = axes.get_legend_handles_labels()
        if legend != "one" and handles:
            width, ncols = (30, 2) if legend == "columns" else (58, 1)
            wrapped = [textwrap.fill(name, width) for name in names]
            # Below the axes: no curve is ever in the way.
            axes.legend(handles, wrapped, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=ncols)
    for axes, group in zip(grid.flat, groups, strict=False):  # now that all is drawn: they may share an axis
        told = coinciding(axes)
        axes.set_title("\n".join(textwrap.fill(line, 48) for line in (group.title, told) if line))
    for axes in list(grid.flat)[len(groups) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel or f"perplexity, {text}")
    if legend == "one":
        handles, names = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, ncols=4, loc="outside upper center")
    return figure


def grouped(points: Sequence[Point], by_pattern: bool = True) -> list[Group]:
    """Points by model, and by pattern too."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        if not point.dense:
            groups.setdefault(f"{point.model}, {point.pattern}" if by_pattern else point.model, []).append(point)
    return [Group(title, found) for title, found in groups.items()]


def split(points: Sequence[Point], key: Callable[[Point], Key]) -> dict[Key, list[Point]]:
    """Points by what they have in common."""
    found: dict[Key, list[Point]] = {}
    for point in points:
        found.setdefault(key(point), []).append(point)
    return found


def others(point: Point) -> str:
    """The varying settings that the method's name does not show."""
    return named(point, lambda key: not key.startswith(("rebuild.", "evals.")))


def named(point: Point, chosen: Callable[[str], bool]) -> str:
    """Varying settings whose key is chosen, each after a comma."""
    found = [f"{short(key)} {value}" for key, value in point.settings.items() if value is not None and chosen(key)]
    return "".join(f", {name}" for name in found)


def apart(points: Sequence[Point]) -> Callable[[Point], str]:
    """The method with the varying settings that its name does not show, but for what all of the points share."""
    settings = [point.settings for point in points]
    varied = {key for one in settings for key in one if any(other.get(key) != one[key] for other in settings)}

    def shown(key: str) -> bool:
        return key in varied and not key.startswith(("rebuild.", "evals."))

    return lambda point: point.method + named(point, shown)


def labels(points: Sequence[Point]) -> list[str]:
    """Names of rows, with the model where there are several."""
    several, name = len({point.model for point in points}) > 1, apart(points)
    return [(f"{point.model}, " if several else "") + f"{point.pattern}, {name(point)}" for point in points]


def of_all(found: Sequence[object], most: int = PANELS) -> str:
    """For the caption, where there are more than fit into a figure."""
    return f"; the first {most} of {len(found)}" if len(found) > most else ""


def empty(width: float, height: float) -> Figure:
    """A figure in inches, drawn without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _perplexity_scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where values span more than a factor of ten; bars begin at nothing where they can."""
    low, high = min(values), max(values)
    if high > 10 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.25, high * 1.25)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
