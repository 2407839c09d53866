"""What two runs have in common and what not: settings, masks, results."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from barber.errors import UserError
from barber.run.reading import read, require_file
from barber.runtime.plain import plain

_MASKS = "masks.safetensors"
_FIGURES = ("perplexity", "kl_divergence", "top1_agreement", "mean_acc", "acc")


@dataclass(frozen=True)
class Differing:
    """Bits of a mask that differ, of all that it has."""

    differing: int
    bits: int

    @property
    def share(self) -> float:
        """Of all bits."""
        return self.differing / self.bits


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Args:
        settings: those that differ, by full key; None where a run has no such key.
        masks: by stage (`initial`, `final`) and linear; empty unless both runs exported their masks.
        results: the figures that both have, by full key.
        seconds: of the walks.
    """

    settings: dict[str, tuple[Any, Any]]
    masks: dict[str, dict[str, Differing]]
    results: dict[str, tuple[float, float]]
    seconds: tuple[float, float]

    def total(self, stage: str) -> Differing:
        """All linears of a stage together."""
        parts = self.masks[stage].values()
        return Differing(sum(part.differing for part in parts), sum(part.bits for part in parts))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "settings that differ"
        yield from (f"  {key}: {left} | {right}" for key, (left, right) in self.settings.items())
        if not self.settings:
            yield "  none"
        for stage, linears in self.masks.items():
            whole = self.total(stage)
            worst, most = max(linears.items(), key=lambda item: item[1].share)
            yield f"{stage} masks: {whole.differing:,} of {whole.bits:,} bits differ ({whole.share:.4%})"
            if most.differing:
                yield f"  most in {worst}: {most.differing:,} of {most.bits:,} ({most.share:.4%})"
        yield "results"
        for key, (left, right) in self.results.items():
            yield f"  {key}: {left:.4f} | {right:.4f}" + (f" ({right / left - 1:+.2%})" if left else "")
        if not self.results:
            yield "  none in both"
        if all(self.seconds):
            left, right = self.seconds
            yield f"seconds of the walk: {left:.1f} | {right:.1f} ({right / left - 1:+.0%})"


def compare(run_a: str | Path, run_b: str | Path) -> Comparison:
    """Compare two runs by their folders: their records and, where both have them, their exported masks.

    Raises:
        UserError: a folder has no record or a damaged one, or masks that cannot be read or are those of another model.
    """
    folders = Path(run_a), Path(run_b)
    left, right = (read(folder) for folder in folders)
    configs = dict(_leaves(left.config)), dict(_leaves(right.config))
    keys = sorted(key for key in configs[0] | configs[1] if configs[0].get(key) != configs[1].get(key))
    figures = dict(_figures(plain(left.results))), dict(_figures(plain(right.results)))
    files = [folder / _MASKS for folder in folders]
    for record, file in zip((left, right), files, strict=True):
        require_file(record, file)
    walks = [sum(record.walk_seconds.values()) for record in (left, right)]
    return Comparison(
        settings={key: (configs[0].get(key), configs[1].get(key)) for key in keys},
        masks=_masks(*files) if all(file.is_file() for file in files) else {},
        results={key: (value, figures[1][key]) for key, value in figures[0].items() if key in figures[1]},
        seconds=(walks[0], walks[1]),
    )


def _masks(first: Path, second: Path) -> dict[str, dict[str, Differing]]:
    try:
        left, right = load_file(first), load_file(second)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{first} and {second} must be masks that export=masks has written: {error}") from error
    if {key: bits.shape for key, bits in left.items()} != {key: bits.shape for key, bits in right.items()}:
        raise UserError(f"{first} and {second} must be masks of the same model, and have other linears")
    found: dict[str, dict[str, Differing]] = {}
    for key in sorted(left):
        stage, _, name = key.partition(".")
        bits = np.unpackbits(left[key] ^ right[key])
        found.setdefault(stage, {})[name] = Differing(int(bits.sum()), bits.size)
    return dict(sorted(found.items(), reverse=True))


def _figures(results: Any) -> Iterator[tuple[str, float]]:
    for key, value in _leaves(results):
        if key.rsplit(".", 1)[-1] in _FIGURES and isinstance(value, float):
            yield key, value


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, part in node.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, node
