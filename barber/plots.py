"""Pictures of a run, drawn without a display."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from barber.api import BlockReport


def plot_losses(blocks: Sequence[BlockReport], title: str, path: Path) -> None:
    """Loss of every block with the initial and with the rebuilt mask, attention and MLP side by side, as PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(block.block for block in blocks))
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        _draw(axis, [block for block in blocks if block.block == name])
        axis.set_title({"attention": "Attention", "mlp": "MLP"}.get(name, name))
    axes[0].set_ylabel("mean squared error of the block's output")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _draw(axis: Axes, blocks: Sequence[BlockReport]) -> None:
    layers = [block.layer for block in blocks]
    before = [block.loss_before or 0.0 for block in blocks]
    after = [block.loss_after or 0.0 for block in blocks]
    axis.plot(layers, before, "o-", color="#9aa0a6", markersize=4, label="initial mask")
    axis.plot(layers, after, "o-", color="#c5221f", markersize=4, label="rebuilt mask")
    axis.fill_between(layers, before, after, color="#c5221f", alpha=0.12, linewidth=0)
    axis.set_yscale("log")
    axis.set_xlabel("decoder layer, counted from 0")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(True, which="major", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
