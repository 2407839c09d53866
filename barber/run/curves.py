"""Curves of a picture that cannot be told apart."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D

_NEAR = 0.01  # of the axes' size: a line's own width, about


def coinciding(axes: Axes) -> str:
    """Which of the labelled curves lie on each other at every point, in words; empty where none do.

    Scales and limits of the axes have to be what they will be.
    """
    axes.get_xlim(), axes.get_ylim()  # which brings the limits up to date
    groups: list[tuple[np.ndarray, list[str]]] = []
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
        if isinstance(line, Line2D):
            places = _places(axes, line)
            same = next((names for other, names in groups if _near(places, other)), None)
            if same is None:
                groups.append((places, [name]))
            else:
                same.append(name)
    return "; ".join(f"{', '.join(names[:-1])} and {names[-1]} coincide" for _, names in groups if len(names) > 1)


def _places(axes: Axes, line: Line2D) -> np.ndarray:
    """Where a line's points are, as shares of the axes' width and height."""
    to_axes = line.get_transform() - axes.transAxes
    return np.asarray(to_axes.transform(line.get_xydata()))


def _near(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and np.allclose(first, second, rtol=0, atol=_NEAR, equal_nan=True)
