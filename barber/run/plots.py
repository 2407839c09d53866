"""Pictures of a run, drawn without a display."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from barber.run.curves import coinciding
from barber.runtime.files import written_whole
from barber.walk.report import BlockReport


def plot_losses(blocks: Sequence[BlockReport], title: str, path: Path) -> None:
    """Loss of every block with the initial and with the rebuilt mask, attention and MLP side by side, as PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(block.block for block in blocks))
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        _draw(axis, [block for block in blocks if block.block == name])
    axes[0].set_yscale("log")  # of all, when all is drawn: one alone may have nothing but zeros
    for axis, name in zip(axes, names, strict=True):
        _title(axis, name)
    axes[0].set_ylabel("mean squared error of the block's output")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")


def plot_block_errors(errors: Mapping[str, Mapping[str, Mapping[str, float | None]]], title: str, path: Path) -> None:
    """Error of every block's output against the dense model's, by stage and text; attention and MLP side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    texts = list(next(iter(errors.values())))
    for axis, kind in zip(axes, _TITLES, strict=True):
        for stage, by_text in errors.items():
            for text, style in zip(texts, itertools.cycle(["o-", "s--", "^:", "v-."])):
                found = [(int(name.split(".")[0]), y) for name, y in by_text[text].items() if name.endswith(kind)]
                label = f"{stage}, {text}" if len(texts) > 1 else stage
                width = 4 if stage == "pruned" else 1.5  # to be seen beneath the rebuilt one where the two are equal
                axis.plot(*zip(*found, strict=True), style, color=_COLORS[stage], linewidth=width, ms=4, label=label)
        _finish(axis)
    axes[0].set_yscale("log")  # of all, when all is drawn: one alone may have nothing but zeros
    for axis, kind in zip(axes, _TITLES, strict=True):
        _title(axis, kind)
    axes[0].set_ylabel("squared distance from the dense model,\nas a share of the dense output's square")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{title}: block outputs on {', '.join(texts)}")
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")


_COLORS = {"pruned": "#9aa0a6", "rebuilt": "#c5221f"}
_TITLES = {"attention": "Attention", "mlp": "MLP"}


def _title(axis: Axes, block: str) -> None:
    """What the curves are of, and which of them lie on each other."""
    told = coinciding(axis)
    axis.set_title(_TITLES.get(block, block) + (f"\n{textwrap.fill(told, 70)}" if told else ""), fontsize="medium")


def _draw(axis: Axes, blocks: Sequence[BlockReport]) -> None:
    layers = [block.layer for block in blocks]
    before = [block.loss_before or 0.0 for block in blocks]
    after = [block.loss_after or 0.0 for block in blocks]
    axis.plot(layers, before, "o-", color=_COLORS["pruned"], markersize=4, label="initial mask")
    axis.plot(layers, after, "o-", color=_COLORS["rebuilt"], markersize=4, label="rebuilt mask")
    axis.fill_between(layers, before, after, color=_COLORS["rebuilt"], alpha=0.12, linewidth=0)
    _finish(axis)


def _finish(axis: Axes) -> None:
    axis.set_xlabel("decoder layer, counted from 0")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(True, which="major", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
