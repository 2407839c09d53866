"""What two runs have in common and what not: settings, masks, results.

    python -m experiments.diff RUN_FOLDER OTHER_RUN_FOLDER

Masks are compared where both folders hold them: exported with export=masks.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def settings(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The settings that differ, by full key."""
    left, right = dict(_leaves(first)), dict(_leaves(second))
    keys = sorted(key for key in left | right if left.get(key) != right.get(key))
    return [f"{key}: {left.get(key)} | {right.get(key)}" for key in keys]


def masks(first: Path, second: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Of the initial and the final masks: differing bits and all bits, by linear."""
    left, right = load_file(first), load_file(second)
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for key in sorted(left.keys() & right.keys()):
        stage, _, name = key.partition(".")
        bits = np.unpackbits(left[key] ^ right[key])
        found.setdefault(stage, {})[name] = (int(bits.sum()), bits.size)
    return found


def results(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Perplexities and KL divergences, side by side, with the change from the first to the second."""
    lines = []
    right = dict(_leaves(second))
    for key, value in _leaves(first):
        if key.rsplit(".", 1)[-1] in ("perplexity", "kl_divergence") and isinstance(value, float) and key in right:
            lines.append(f"{key}: {value:.4f} | {right[key]:.4f} ({right[key] / value - 1:+.2%})")
    return lines


def report(first: Path, second: Path) -> str:
    """Everything, as lines of text."""
    left, right = (json.loads((folder / "record.json").read_text(encoding="utf-8")) for folder in (first, second))
    lines = ["settings that differ", *(settings(left["config"], right["config"]) or ["none"])]
    files = [folder / "masks.safetensors" for folder in (first, second)]
    if all(file.exists() for file in files):
        for stage, linears in masks(*files).items():
            differing, bits = (sum(part) for part in zip(*linears.values(), strict=True))
            worst, (most, of) = max(linears.items(), key=lambda item: item[1][0] / item[1][1])
            lines += ["", f"{stage} masks: {differing:,} of {bits:,} bits differ ({differing / bits:.4%})"]
            lines.append(f"most in {worst}: {most:,} of {of:,} ({most / of:.4%})")
    lines += ["", "results", *(results(left["results"], right["results"]) or ["none in both"])]
    walks = [sum(record["walk_seconds"].values()) for record in (left, right)]
    if all(walks):
        lines.append(f"seconds of the walk: {walks[0]:.1f} | {walks[1]:.1f} ({walks[1] / walks[0] - 1:+.0%})")
    return "\n".join(lines)


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, part in node.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m experiments.diff RUN_FOLDER OTHER_RUN_FOLDER")
    print(report(Path(sys.argv[1]), Path(sys.argv[2])))
