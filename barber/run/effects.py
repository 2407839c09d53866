"""What a run was asked for and what changed nothing, in one sentence."""

from collections.abc import Iterator

from barber.methods.rebuild import Barber, DSnoT, Rebuild, Swaps
from barber.run.experiment import Experiment
from barber.walk.report import Report


def without_effect(experiment: Experiment, report: Report) -> str | None:
    """What had no effect in any block, and what would have one; None: everything had."""
    found = [*_kept_in_vain(experiment), *_exchanging_nothing(experiment, report)]
    return f"Without effect: {'; '.join(found)}." if found else None


def _kept_in_vain(experiment: Experiment) -> Iterator[str]:
    """Steps that keep the weights as the pruner updated them, where those are the dense ones."""
    updated = getattr(experiment.pruner, "updates", True)  # a pruner of somebody else's need not say so
    for key, step in experiment.steps.items():
        keeps = isinstance(step, Barber) and step.retain_reconstruction
        if keeps and not updated:
            yield f"{key}.retain_reconstruction=true (it keeps something right after pruner=sparsegpt)"
        if isinstance(step, Barber | DSnoT | Swaps):
            updated = updated and keeps


def _exchanging_nothing(experiment: Experiment, report: Report) -> Iterator[str]:
    """Steps that exchanged no pair, though the initial masks lose something."""
    if not any(block.loss_before for block in report.blocks):
        return
    for (key, step), exchanges in zip(experiment.steps.items(), report.by_step, strict=False):
        if not exchanges and (asked := _asked_for(key, step)):
            yield f"{asked} exchanged no pair in any block{_more_than(step)}"


def _asked_for(key: str, step: Rebuild) -> str | None:
    """A step that was to exchange pairs, by what decides how many; None: it was not."""
    if isinstance(step, Barber):
        return f"{key}.alpha={step.alpha}" if step.alpha else None
    return key if isinstance(step, DSnoT | Swaps) else None


def _more_than(step: Rebuild) -> str:
    """What would have an effect in the place of a step."""
    if isinstance(step, Swaps) and step.follow:  # which is the best mask already
        return ""
    larger = isinstance(step, Barber) and step.alpha not in ("auto", 1)
    return f" ({'a larger one may, and ' if larger else ''}method=best_mask gains more)"
