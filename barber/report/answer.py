"""What an experiment has found, in one sentence made from its figures."""

from collections import Counter
from collections.abc import Sequence

from barber.report.panels import apart, split
from barber.report.points import Mean, Point, comparable
from barber.report.table import in_percent, primary_text, with_std

_TOLD = 3  # models and patterns whose best are told one by one


def answer(points: Sequence[Point]) -> str:
    """Which setting does best, by how much; of many models and patterns, how often each does."""
    text = primary_text(points)
    found = comparable(points, text) if text else []
    groups = split([point for point in found if not point.dense], lambda point: (point.model, point.pattern))
    if not text or not groups:
        return "No figure yet."
    if len(groups) > _TOLD:
        return _counted(list(groups.values()), text)
    dense = {point.model: f" (dense: {with_std(point.perplexity[text], '.2f')})" for point in found if point.dense}
    told = [_best(group, text) + dense.get(model, "") + _accuracy(group) for (model, _), group in groups.items()]
    return f"On {text}, {'; '.join(told)}."


def _best(group: Sequence[Point], text: str) -> str:
    """The lowest perplexity of a model and pattern, and how far above it the next and the last are."""
    name = apart(group)
    first, *others = sorted(group, key=lambda point: point.perplexity[text].mean)
    best = first.perplexity[text]
    figure, where = with_std(best, ".2f"), f"{first.model} at {first.pattern}"
    if not others:
        return f"{where} has a perplexity of {figure} with {name(first)}"
    means = [point.perplexity[text] for point in others]
    gaps = [f"{_below(best, means[0])} below {name(others[0])}, the next{_caution(best, means[0])}"]
    if len(others) > 1:
        gaps.append(f"{_below(best, means[-1])} below {name(others[-1])}, the last of {len(group)}")
    return f"{where} has its lowest perplexity, {figure}, with {name(first)}: {', and '.join(gaps)}"


def _below(low: Mean, high: Mean) -> str:
    percent = 100 * (1 - low.mean / high.mean)
    return f"{percent:.1f}%" if percent >= 0.05 or not percent else "less than 0.1%"


def _caution(best: Mean, other: Mean) -> str:
    """Where the difference is smaller than what stands behind a ±."""
    spreads = [spread for mean in (best, other) if (spread := mean.error if mean.std is None else mean.std) is not None]
    return " (less than one ± apart)" if spreads and other.mean - best.mean < max(spreads) else ""


def _accuracy(group: Sequence[Point]) -> str:
    measured = [(point.accuracy.mean, in_percent(point.accuracy), point) for point in group if point.accuracy]
    if not measured:
        return ""
    _, mean, point = max(measured, key=lambda one: one[0])
    highest = "highest " if len(measured) > 1 else ""
    return f", and its {highest}zero-shot accuracy is {with_std(mean, '.2f')}%, with {apart(group)(point)}"


def _counted(groups: Sequence[Sequence[Point]], text: str) -> str:
    wins = Counter(min(group, key=lambda point: point.perplexity[text].mean).method for group in groups)
    told = [f"{winner} in {count}" for winner, count in wins.most_common()]
    return f"Of {len(groups)} models and patterns, the lowest perplexity on {text} is that of {', of '.join(told)}."
