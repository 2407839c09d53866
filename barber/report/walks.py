"""Figures of what a walk did: seconds, losses, exchanges."""

import itertools
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from barber.report.panels import COLORS, PANELS, Group, empty, labels, of_all, panels, split
from barber.report.points import Point
from barber.report.records import Run

_BARS = 24  # at most in a figure
_PHASES = (*COLORS[:6], "#999999", "#333333", "#882255", "#DDCC77", "#44AA99", "#332288")


def time_and_memory(points: Sequence[Point]) -> tuple[str, Figure | None]:
    """Seconds of the walk by phase, and peak memory where it is recorded, a bar a row of the table."""
    found = _with_a_rival([point for point in points if _phases(point)])
    timed = found[:_BARS]
    memory = [point.memory / 2**30 if point.memory else 0.0 for point in timed]
    caption = (
        "Seconds of the walk by phase, mean over seeds, without resumed runs"
        f"{'; peak memory' if any(memory) else ''}{of_all(found, _BARS)}."
    )
    if not timed:
        return caption, None
    names = [textwrap.fill(label, 60) for label in labels(found)[:_BARS]]
    most_lines = max(name.count("\n") + 1 for name in names)
    figure = empty(11.0 if any(memory) else 8.0, 1.4 + (0.08 + 0.14 * most_lines) * len(timed))
    ratios = [2.2, 1] if any(memory) else [1]
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    _stack(axes[0], [_phases(point) for point in timed])
    axes[0].set_yticks(range(len(timed)), names, fontsize=7)
    axes[0].set_ylim(len(timed) - 0.4, -0.6)
    axes[0].set_xlabel("seconds of the walk")
    if any(memory):
        axes[1].barh(range(len(timed)), memory, color="0.55", height=0.75)
        axes[1].set_xlabel("peak memory (GiB)")
    for axis in axes:
        axis.grid(True, axis="x", alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside upper center")
    return caption, figure


def block_losses(points: Sequence[Point]) -> tuple[str, Figure | None]:
    """Every block's output error with the initial and with the rebuilt mask."""
    found = [(point, blocks) for point in points if not point.dense and (blocks := _rebuilt_blocks(point.runs[0]))]
    shown = found[:PANELS]
    caption = "Error of every block's output, initial mask (dashed) and rebuilt mask (solid)" + of_all(found) + "."
    groups = [Group(label, [point]) for label, (point, _) in zip(labels([p for p, _ in shown]), shown, strict=True)]
    blocks_of = {id(point): blocks for point, blocks in shown}

    def panel(axes: Axes, group: Group) -> None:
        blocks = blocks_of[id(group.points[0])]
        for name, color in zip(dict.fromkeys(block["block"] for block in blocks), COLORS, strict=False):
            part = [block for block in blocks if block["block"] == name]
            layers = [block["layer"] for block in part]
            for key, mask, style in (("loss_before", "initial", "--"), ("loss_after", "rebuilt", "-")):
                losses = [block[key] for block in part]
                axes.plot(layers, losses, style, color=color, linewidth=1.2, label=f"{name}, {mask}")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")

    of_one_model = len({point.model for point, _ in shown}) == 1  # else the errors have no common scale
    return caption, panels(groups, panel, ylabel="mean squared error", share_y=of_one_model, legend="one")


def exchanges(points: Sequence[Point]) -> tuple[str, Figure | None]:
    """Share of exchanged weights as a heat map, linears by layers."""
    found = [(p, of_run) for p in points if not p.dense and (of_run := exchange_grid(p.runs[0])) and of_run[1].any()]
    shown = found[:PANELS]
    caption = "Exchanged pairs as a share of a linear's weights, by decoder layer; grey: none" + of_all(found) + "."
    if not shown:
        return caption, None
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = empty(4.6 * columns + 0.8, 0.8 + 1.75 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    shares = np.concatenate([grid[grid > 0] for _, (_, grid) in shown])
    norm = LogNorm(shares.min(), max(shares.max(), shares.min() * 1.01))
    for axis, (_, (names, grid)), label in zip(axes, shown, labels([p for p, _ in shown]), strict=False):
        _heat_map(axis, names, grid, norm)
        axis.set_title(textwrap.fill(label, 64))
    for axis in axes[len(shown) :]:
        axis.remove()
    colors = ScalarMappable(norm, "cividis")
    figure.colorbar(colors, ax=axes[: len(shown)], label="share of the weights", shrink=0.8)
    return caption, figure


def _heat_map(axes: Axes, names: Sequence[str], grid: np.ndarray, norm: LogNorm) -> None:
    axes.set_facecolor("0.85")
    rows, columns = (np.arange(size + 1) - 0.5 for size in grid.shape)
    axes.pcolormesh(columns, rows, np.ma.masked_less_equal(grid, 0), norm=norm, cmap="cividis")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer")


def exchange_grid(run: Run) -> tuple[list[str], np.ndarray] | None:
    """Names of the linears of a layer, and their share of exchanged weights, (linears, layers)."""
    cells: dict[tuple[str, int], float] = {}
    for name, counts in (run.record.get("linears") or {}).items():
        if (match := re.search(r"\.(\d+)\.(.+)$", name)) and counts.get("weights"):
            cells[match[2], int(match[1])] = counts.get("exchanges", 0) / counts["weights"]
    if not cells:
        return None
    names = list(dict.fromkeys(name for name, _ in cells))
    grid = np.zeros((len(names), 1 + max(layer for _, layer in cells)))
    for (name, layer), share in cells.items():
        grid[names.index(name), layer] = share
    endings = [name.rsplit(".", 1)[-1] for name in names]
    return (endings if len(set(endings)) == len(names) else names), grid


def _with_a_rival(points: Sequence[Point]) -> list[Point]:
    """The points whose seconds there is something to hold against: another one of their model and machine."""
    groups = split(points, lambda point: (point.model, point.machine))
    return [point for group in groups.values() if len(group) > 1 for point in group]


def _stack(axes: Axes, seconds: Sequence[dict[str, float]]) -> None:
    left = np.zeros(len(seconds))
    phases = dict.fromkeys(phase for one in seconds for phase in one)
    for phase, color in zip(phases, itertools.cycle(_PHASES), strict=False):
        lengths = np.array([one.get(phase, 0.0) for one in seconds])
        axes.barh(range(len(seconds)), lengths, left=left, color=color, label=phase, height=0.75)
        left += lengths


def _phases(point: Point) -> dict[str, float]:
    """Mean seconds over the runs that walked through all layers in one go; the dense point's runs are other points'."""
    runs = [] if point.dense else [run.phases for run in point.runs if not run.resumed]
    return {
        phase: sum(one.get(phase, 0.0) for one in runs) / len(runs)
        for phase in dict.fromkeys(phase for one in runs for phase in one)
    }


def _rebuilt_blocks(run: Run) -> list[dict[str, Any]]:
    blocks = [b for b in run.blocks() if b.get("loss_before") is not None and b.get("loss_after") is not None]
    return blocks if len(blocks) > 1 and any(b["loss_before"] or b["loss_after"] for b in blocks) else []
