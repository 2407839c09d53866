"""What a dense model holds: finished layers belong to these weights, and are not mixed with those of others."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from barber.errors import UserError
from barber.model.checkpoint import MODEL, Checkpoint
from barber.model.weights import Weights
from barber.runtime.plain import typed
from barber.runtime.seals import Seal
from barber.runtime.tensors import digest_of_tensors

Times = Mapping[str, list[int]]


def times_of(files: Iterable[Path]) -> Times:
    """Size in bytes and time of the last change in ns of files, by their paths."""
    stats = {str(file): file.stat() for file in files}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def require_the_same(checkpoint: Checkpoint, weights: Weights, times: Times, *, reads: bool, looks_ahead: bool) -> None:
    """See that finished layers were made of these weights; where there are none, note what the weights are.

    What has its size and its time is trusted, otherwise it is read again. A layer's own digest is taken in the walk
    and kept with it.

    Args:
        weights: of the dense model, before the walk.
        times: of the model's files, from before they were read.
        reads: trust no times.
        looks_ahead: what becomes of a layer depends on those after it, too: gradients of the loss, an allocation.

    Raises:
        UserError: they were made of others.
    """
    if not checkpoint.num_finished:
        layers = range(checkpoint.num_layers if looks_ahead else 0)
        digests = [digest_of_tensors(weights.dense(index)) for index in layers]
        content: dict[str, Any] = {"files": times, "outside": digest_of_tensors(weights.dense(None)), "layers": digests}
        if checkpoint.ranks.leads:
            Seal(content).write(checkpoint.folder / MODEL)
        return
    known = typed(dict[str, Any], Seal.read(checkpoint.folder / MODEL).content)
    if known["files"] == times and times and not reads:
        return
    expected: dict[int | None, str] = {index: checkpoint.dense(index) for index in range(checkpoint.num_finished)}
    expected |= dict(enumerate(known["layers"]))
    expected[None] = known["outside"]
    for index, digest in expected.items():
        tensors = weights.dense(index)
        if digest_of_tensors(tensors) != digest:
            changed = [file for file in times if times[file] != known["files"].get(file)] or list(times)
            file = _holder(changed, list(tensors))
            raise UserError(
                f"hydra.run.dir holds an unfinished run of other weights: {file} is not what it was; "
                f"put back what was there, or remove {checkpoint.folder} to begin anew"
            )


def _holder(files: list[str], names: list[str]) -> str:
    """The first of some files that holds one of some tensors, whatever stands before their names."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held = list(opened.keys())
        if any(name.endswith(key) or key.endswith(name) for key in held for name in names):
            return file
    return files[0] if files else "the model"
