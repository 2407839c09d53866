"""Figures of perplexity over what was varied."""

import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from barber.report.panels import COLORS, Group, apart, grouped, named, of_all, others, panels, split
from barber.report.points import Point

MARKERS = "osD^vPX"
_FAR = 5


def over_sparsity(points: Sequence[Point], text: str) -> tuple[str, Figure | None]:
    """Perplexity over unstructured sparsity, a line a method."""
    unstructured = [point for point in points if ":" not in point.pattern]
    models = [found for group in grouped(unstructured, by_pattern=False) if (found := _on_lines(group)).points]

    def panel(axes: Axes, group: Group) -> None:
        for style, (label, line) in zip(_styles(), _lines(group.points, apart(group.points), _sparsity), strict=False):
            _line(axes, line, label, text, style)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
        axes.set_xticks(sorted({point.runs[0].sparsity for point in group.points}))
        axes.set_xlabel("sparsity")

    caption = f"Perplexity on {text} over unstructured sparsity{_std_note(points)}{of_all(models)}."
    return caption, panels(models, panel, text, legend="lines")


def over_alpha(points: Sequence[Point], text: str) -> tuple[str, Figure | None]:
    """Perplexity over alpha, a line a granularity, the initial mask alone as a dashed line."""
    groups = [
        group
        for group in _rebuilt_groups(points)
        if any(len({x for x, _ in line}) > 1 for _, line in _lines(group.points, _granularity, _alpha))
    ]

    def panel(axes: Axes, group: Group) -> None:
        for style, (label, line) in zip(_styles(), _lines(group.points, _granularity, _alpha), strict=False):
            _line(axes, line, label, text, style)
        alone = [p for p in points if _initial_mask(p, group.points[0])]
        if alone:
            value = alone[0].perplexity[text].mean
            axes.axhline(value, color="0.35", linewidth=1, linestyle="--", label=f"{alone[0].method} alone")
        _alpha_axis(axes, sorted({_alpha(point) or 0.0 for point in group.points}))

    caption = f"Perplexity on {text} over alpha, by granularity{_std_note(points)}{of_all(groups)}."
    return caption, panels(groups, panel, text)


def by_granularity(points: Sequence[Point], text: str) -> tuple[str, Figure | None]:
    """Perplexity by granularity, a bar an alpha."""
    groups = [
        group
        for group in _rebuilt_groups(points)
        if any(len({_granularity(point) for point in found}) > 1 for found in split(group.points, _alpha).values())
    ]

    def panel(axes: Axes, group: Group) -> None:
        names = sorted({_granularity(point) for point in group.points}, key=_from_small_to_large)
        alphas = sorted({_alpha(point) or 0.0 for point in group.points})
        width = 0.8 / len(alphas)
        for i, alpha in enumerate(alphas):
            found = [(names.index(_granularity(p)), p.perplexity[text]) for p in group.points if _alpha(p) == alpha]
            color = matplotlib.colormaps["cividis"](0.1 + 0.8 * i / max(1, len(alphas) - 1))
            axes.bar(
                [x + (i - (len(alphas) - 1) / 2) * width for x, _ in found],
                [mean.mean for _, mean in found],
                width * 0.92,
                yerr=[mean.std or 0.0 for _, mean in found] if any(mean.std for _, mean in found) else None,
                color=color,
                error_kw={"ecolor": "0.3", "capsize": 2},
                label=f"alpha {alpha:g}",
            )
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("granularity")

    caption = f"Perplexity on {text} by granularity and alpha{_std_note(points)}{of_all(groups)}."
    return caption, panels(groups, panel, text)


def pareto(points: Sequence[Point], text: str) -> tuple[str, Figure | None]:
    """Perplexity against seconds of the walk, every recipe numbered; what no other beats in both is joined."""
    timed = [p for p in points if p.walk is not None and not any(run.resumed for run in p.runs)]
    groups = [group for group in _of_one_machine(grouped(timed)) if len(group.points) > 1]

    def panel(axes: Axes, group: Group) -> None:
        found = sorted((p.walk.mean, p.perplexity[text].mean) for p in group.points if p.walk)
        keys, best = _keys(group, text), non_dominated(found)
        places = within_sight(found)
        axes.plot([places[i][0] for i in best], [places[i][1] for i in best], color=COLORS[0], linewidth=1.2)
        above = 0
        for which, color in ((best, COLORS[0]), ([i for i in range(len(found)) if i not in best], "0.45")):
            style: dict[str, Any] = {"textcoords": "offset points", "color": color}
            for i in which:
                marker = "o" if places[i] == found[i] else "^"
                axes.scatter(*places[i], s=22, color=color, marker=marker, zorder=2)
                axes.annotate(str(i + 1), places[i], (4, 4), fontweight="bold", **style)
            # below the axes, where no point is in the way
            lines = [line for i in which for line in keys[i]]
            at = (0, -34 - 8.4 * above)
            axes.annotate("\n".join(lines), (0, 0), at, "axes fraction", va="top", fontsize=7, **style)
            above += len(lines)
        axes.set_xlabel("seconds of the walk")
        axes.margins(0.1, 0.15)

    caption = (
        f"Perplexity on {text} against the seconds of the walk. Blue and joined: no other run of the panel has "
        f"both a lower perplexity and fewer seconds. A triangle lies out of sight, above {_FAR} medians of the panel. "
        f"Resumed runs are left out{of_all(groups)}."
    )
    longest = max((sum(map(len, _keys(group, text))) for group in groups), default=0)
    return caption, panels(groups, panel, ylabel=f"perplexity, {text}", below=longest * 8.4 / 72)


def within_sight(found: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where points are drawn: those far above the others would press them together, and go to the upper edge."""
    values = [y for _, y in found]
    highest = max(y for y in values if y <= _FAR * median(values))
    return [(x, y if y <= highest else highest + 0.1 * (highest - min(values))) for x, y in found]


def _keys(group: Group, text: str) -> list[list[str]]:
    """Number, perplexity and name of every point by its seconds, in short lines; what all points share is left out."""
    ordered = sorted(group.points, key=lambda p: (p.walk.mean if p.walk else 0.0, p.perplexity[text].mean))
    name = apart(group.points)
    lines = [f"{i}  {point.perplexity[text].mean:.2f}  {name(point)}" for i, point in enumerate(ordered, 1)]
    return [textwrap.wrap(line, 62) for line in lines]


def non_dominated(found: Sequence[tuple[float, float]]) -> list[int]:
    """Which pairs no other pair is at least as small as in both numbers and smaller in one."""
    return [i for i, (x, y) in enumerate(found) if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in found)]


def _from_small_to_large(granularity: str) -> int:
    order = ("output", "input", "layer", "block")
    return order.index(granularity) if granularity in order else len(order)


def _alpha_axis(axes: Axes, alphas: Sequence[float]) -> None:
    """Logarithmic where alphas span a factor of ten or more; 0 keeps its place at the left."""
    positive = [alpha for alpha in alphas if alpha > 0]
    if positive and max(positive) >= 10 * min(positive):
        if len(positive) == len(alphas):
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
            axes.set_xlim(-0.3 * min(positive), 1.3 * max(positive))
    axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlabel("alpha")


def _line(axes: Axes, line: Sequence[tuple[float, Point]], label: str, text: str, style: dict[str, Any]) -> None:
    means = [point.perplexity[text] for _, point in line]
    errors = [mean.std or 0.0 for mean in means] if any(mean.std for mean in means) else None
    values = [mean.mean for mean in means]
    axes.errorbar([x for x, _ in line], values, errors, label=label, capsize=2, linewidth=1.3, markersize=4, **style)


def _styles() -> Iterator[dict[str, Any]]:
    for dash in itertools.cycle(("-", ":", "-.")):
        for color, marker in zip(COLORS, MARKERS, strict=True):
            yield {"color": color, "marker": marker, "linestyle": dash}


def _lines(
    points: Sequence[Point], label: Callable[[Point], str], x: Callable[[Point], float | None]
) -> list[tuple[str, list[tuple[float, Point]]]]:
    lines: dict[str, list[tuple[float, Point]]] = {}
    for point in points:
        if (value := x(point)) is not None:
            lines.setdefault(label(point), []).append((value, point))
    return [(name, sorted(line, key=lambda one: one[0])) for name, line in lines.items()]


def _on_lines(group: Group) -> Group:
    """What a line over sparsity has on it: a point alone has nothing in common with the others."""
    lines = _lines(group.points, apart(group.points), _sparsity)
    return Group(group.title, [point for _, line in lines if len(line) > 1 for _, point in line])


def _of_one_machine(groups: Sequence[Group]) -> list[Group]:
    """Groups whose seconds can be compared."""
    found = []
    for group in groups:
        machines = split(group.points, lambda point: point.machine)
        names = {machine: f", {machine}" if len(machines) > 1 else "" for machine in machines}
        found += [Group(group.title + names[machine], points) for machine, points in machines.items()]
    return found


def _rebuilt_groups(points: Sequence[Point]) -> list[Group]:
    """Rebuilt points that differ in alpha and granularity only."""
    hidden = ("rebuild.barber.alpha", "rebuild.barber.granularity")
    groups: dict[str, list[Point]] = {}
    for point in points:
        if _alpha(point) is not None and ("+" in point.method or point.method.endswith("(mask only)")):
            rest = named(point, lambda key: key not in hidden and not key.startswith("evals."))
            groups.setdefault(f"{point.model}, {point.pattern}, {point.method.split(' ')[0]}{rest}", []).append(point)
    return [Group(title, found) for title, found in groups.items()]


def _initial_mask(point: Point, rebuilt: Point) -> bool:
    same = (point.model, point.pattern) == (rebuilt.model, rebuilt.pattern)
    return same and point.method == rebuilt.method.split(" ")[0] and others(point) == others(rebuilt)


def _sparsity(point: Point) -> float | None:
    return point.runs[0].sparsity


def _alpha(point: Point) -> float | None:
    return point.runs[0].steps.get("barber", {}).get("alpha")


def _granularity(point: Point) -> str:
    return str(point.runs[0].steps.get("barber", {}).get("granularity"))


def _std_note(points: Sequence[Point]) -> str:
    several = any(len(point.runs) > 1 for point in points)
    return "; error bars are one standard deviation over seeds" if several else ""
