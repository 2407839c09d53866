"""Finished layers on disk: a run that was killed goes on at its first unfinished layer.

A folder with, for every finished layer, its tensors (`layer-00007.safetensors`, the shard of a pruned model), both
masks and where the initially pruned weights differ (`pruned-00007.safetensors`), and its reports (`layer-00007.json`,
written last: the layer counts as finished from then on); and the activations that the next layer begins with. Every
file appears whole or not at all.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import distributed

from barber.errors import UserError
from barber.runtime.activations import Activations
from barber.runtime.distributed import Ranks
from barber.runtime.tensors import Tensor, as_bytes, batches

FOLDER = "checkpoint"
_FACTS = "settings.json"
_LOCK = "lock"
_TIME = re.compile(r"^\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")


@dataclass(frozen=True)
class Difference:
    """Where the initially pruned weight of a linear differs from its final one, and what it is there.

    Args:
        places_K: indices into the flattened weight (O, I), int64.
        values_K: the initially pruned weight there, in the dtype in which the model is stored.
        initial, final: the pruned bits of the flattened weight, packed big-endian as numpy.packbits does.
    """

    places_K: Tensor
    values_K: Tensor
    initial: Tensor
    final: Tensor

    @classmethod
    def between(cls, initial: tuple[Tensor, Tensor], final: tuple[Tensor, Tensor], dtype: torch.dtype) -> "Difference":
        """From the masks and float32 weights (O, I) of a linear, initially pruned and final."""
        (initial_mask_OI, initial_OI), (final_mask_OI, final_OI) = initial, final
        # As integers of the same bits: 0.0 and -0.0 are equal as numbers.
        differ_OI = initial_OI.contiguous().view(torch.int32) != final_OI.contiguous().view(torch.int32)
        places_K = differ_OI.flatten().nonzero().squeeze(1)
        values_K = initial_OI.flatten()[places_K].to("cpu", dtype)
        return cls(places_K.cpu(), values_K, packed(initial_mask_OI), packed(final_mask_OI))


@dataclass
class Checkpoint:
    """The finished layers of a run.

    Args:
        folder: where they are.
        num_layers: of the model.
        ranks: of the processes that share the samples; one of them writes.
    """

    folder: Path
    num_layers: int
    ranks: Ranks = field(default_factory=Ranks)
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), repr=False)
    _written: Future[None] | None = field(default=None, repr=False)
    _uncommitted: list[tuple[Path, Path]] = field(default_factory=list, repr=False)

    @property
    def num_finished(self) -> int:
        """How many layers are finished, from the first."""
        self.wait()
        finished = 0
        while finished < self.num_layers and self._path("layer", finished, "json").exists():
            finished += 1
        return finished

    def write_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a layer's tensors, as they are stored, by their names in the model."""
        if self.ranks.leads:
            whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            self._write(self._path("layer", index), lambda path: save_file(whole, path, {"format": "pt"}))

    def finish_layer(
        self,
        index: int,
        reports: list[dict[str, Any]],
        differences: Mapping[str, Difference],
        streams: Mapping[str, Activations],
        batch_size: int,
        num_samples: int,
    ) -> None:
        """Write all else about a layer whose tensors are written; it counts as finished when this has reached the disk.

        The files are brought to the disk while the next layer is at work.
        """
        obsolete = self._path("activations", index)
        if index + 1 < self.num_layers:
            self._write_streams(self._path("activations", index + 1), streams, batch_size, num_samples)
        if not self.ranks.leads:
            return
        parts = {
            f"{part}.{name}": getattr(difference, part) for name, difference in differences.items() for part in _PARTS
        }
        self._write(self._path("pruned", index), lambda path: save_file(parts, path))
        text = json.dumps(reports)
        self._write(self._path("layer", index, "json"), lambda path: path.write_text(text, encoding="utf-8"))
        self.wait()
        files, self._uncommitted = self._uncommitted, []
        self._written = self._writer.submit(_commit, files, obsolete)

    def wait(self) -> None:
        """Wait until everything that was written is on the disk.

        Raises:
            OSError: it could not be.
        """
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer."""
        self.wait()
        with _reading(self._path("layer", index)) as path:
            return load_file(path)

    def layer_file(self, index: int) -> Path:
        """The file of the tensors of a layer."""
        self.wait()
        return self._path("layer", index)

    def reports(self, index: int) -> list[dict[str, Any]]:
        """The reports of a finished layer's blocks."""
        with _reading(self._path("layer", index, "json")) as path:
            found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            return found

    def differences(self, index: int) -> dict[str, Difference]:
        """Where the initially pruned weights of a finished layer differ, by the name of the linear."""
        self.wait()
        with _reading(self._path("pruned", index)) as path:
            parts = load_file(path)
        names = [key.removeprefix("final.") for key in parts if key.startswith("final.")]
        return {name: Difference(*(parts[f"{part}.{name}"] for part in _PARTS)) for name in names}

    def restore(self, streams: Mapping[str, Activations], batch_size: int, num_samples: int) -> None:
        """Fill this process's share of the streams with what the first unfinished layer begins with."""
        index = self.num_finished
        if index == self.num_layers:
            return
        share = self.ranks.share(num_samples)
        with _reading(self._path("activations", index)) as path, safe_open(path, framework="pt") as file:
            kept = list(file.keys())
            distinct = len({id(stream) for stream in streams.values()})
            if distinct > len(kept):  # the initial masks were known when it began, and are not any more
                raise UserError(
                    f"hydra.run.dir holds an unfinished run whose initial masks were kept in the cache and are gone; "
                    f"remove {self.folder} to begin anew"
                )
            # Where one stream is left of two, it is that of the rebuilding.
            for name in kept if distinct == len(kept) else kept[-1:]:
                stream, values = streams[name], file.get_slice(name)
                for batch in batches(stream.shape[0], batch_size):
                    stream[batch] = values[share.start + batch.start : share.start + batch.stop]

    def remove(self) -> None:
        """Delete the folder: what it was for is done."""
        self.wait()
        if self.ranks.leads:
            shutil.rmtree(self.folder)

    def _path(self, kind: str, index: int, ending: str = "safetensors") -> Path:
        return self.folder / f"{kind}-{index:05d}.{ending}"

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        unfinished = path.with_name(f".{path.name}.unfinished")
        write(unfinished)
        self._uncommitted.append((unfinished, path))

    def _write_streams(self, path: Path, streams: Mapping[str, Activations], batch_size: int, num_samples: int) -> None:
        """Write the streams of all processes, a batch at a time: they need not fit into memory."""
        distinct = {id(stream): stream for stream in streams.values()}
        if not self.ranks.leads:
            for stream in distinct.values():
                for batch in batches(stream.shape[0], batch_size):
                    distributed.send(stream[batch].cpu().contiguous(), dst=0)
            return

        def write(unfinished: Path) -> None:
            with unfinished.open("wb") as file:
                file.write(_header(streams, num_samples))
                for stream in distinct.values():
                    for rank in range(self.ranks.size):
                        share = self.ranks.share(num_samples, rank)
                        for batch in batches(share.stop - share.start, batch_size):
                            file.write(as_bytes(self._received(stream, batch, rank).contiguous()))

        self._write(path, write)

    def _received(self, stream: Activations, batch: slice, rank: int) -> Tensor:
        if rank == 0:
            return stream[batch].cpu()
        part_BLD = torch.empty(batch.stop - batch.start, *stream.shape[1:], dtype=stream.dtype)
        distributed.recv(part_BLD, src=rank)
        return part_BLD


_PARTS = ("places_K", "values_K", "initial", "final")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def packed(mask_OI: Tensor) -> Tensor:
    """The bits of a mask, eight a byte, big-endian: uint8."""
    return torch.from_numpy(np.packbits(mask_OI.cpu().numpy()))


def begin(folder: Path, facts: dict[str, Any], may_resume: bool) -> tuple[IO[str], Path | None]:
    """Make a run's checkpoint folder, or take over that of a run that was interrupted.

    Args:
        folder: of the run.
        facts: what the finished layers depend on: of the interrupted run they have to be the same.
        may_resume: whether to go on with an interrupted run: that of this folder, or of one beside it whose name
            differs in nothing but the time that it begins with.

    Returns the lock, to be held as long as the run goes on, and the folder that an interrupted run's layers came from.

    Raises:
        UserError: the folder holds an unfinished run that must not be gone on with, or one that is still going on.
    """
    own = folder / FOLDER
    facts = json.loads(json.dumps(facts))
    there = _facts_in(own)
    if there is not None and holds_layers(folder):
        if not may_resume:
            raise UserError("hydra.run.dir holds an unfinished run; resume=auto goes on with it, or choose another")
        if differing := _differing(there, facts):
            raise UserError(
                f"hydra.run.dir holds an unfinished run with other settings ({differing}); "
                "give the same ones, or choose another folder"
            )
        return _locked(folder), folder
    if own.exists():  # it came to nothing, or nobody knows what its layers are
        _locked(folder).close()
        _clear(own)
    for other in _of_the_same_name(folder) if may_resume else ():
        if _facts_in(other) != facts or not any(other.glob("layer-*.json")) or (lock := _lock(other)) is None:
            continue
        try:
            other.rename(own)
        except OSError:  # another run was faster
            lock.close()
            continue
        return lock, other.parent
    own.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    unfinished = own / f".{_FACTS}.unfinished"
    unfinished.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    unfinished.replace(own / _FACTS)
    return lock, None


def holds_layers(folder: Path) -> bool:
    """Whether a run folder holds finished layers of a run that was interrupted."""
    return any((folder / FOLDER).glob("layer-*.json"))


def require_idle(folder: Path) -> None:
    """Refuse a run folder in which a run goes on.

    Raises:
        UserError: one does.
    """
    if (folder / FOLDER / _LOCK).exists():
        _locked(folder).close()


def _clear(own: Path) -> None:
    """Remove what checkpoints consist of, and the folder if that was all."""
    for pattern in ("layer-*", "pruned-*", "activations-*", ".*.unfinished", _FACTS, _LOCK):
        for file in own.glob(pattern):
            file.unlink()
    with suppress(OSError):
        own.rmdir()


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"hydra.run.dir holds an unfinished run, but {path} cannot be read ({error}); "
            f"remove {path.parent} to begin anew"
        ) from error


def _of_the_same_name(folder: Path) -> list[Path]:
    """The checkpoint folders of runs that were begun at other times, the latest first."""
    own = _TIME.sub("", folder.name)
    if own == folder.name:
        return []
    others = [other for other in folder.parent.glob(f"*/{FOLDER}") if _TIME.sub("", other.parent.name) == own]
    return sorted(others, reverse=True)


def _facts_in(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs, by full key: `rebuild.barber.alpha: 0.1 there, 0.2 here`."""
    left, right = _flat(there), _flat(here)
    keys = sorted(key for key in left | right if left.get(key) != right.get(key))
    return ", ".join(f"{key}: {left.get(key)} there, {right.get(key)} here" for key in keys)


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {key: node}
    flat: dict[str, Any] = {}
    for name, part in node.items():
        flat |= _flat(part, f"{key}.{name}" if key else name)
    return flat


def _locked(folder: Path) -> IO[str]:
    lock = _lock(folder / FOLDER)
    if lock is None:
        raise UserError(f"hydra.run.dir is the folder of a run that is still going on, {folder}; choose another")
    return lock


def _lock(folder: Path) -> IO[str] | None:
    """Held until the process ends, however it ends; None where another holds it."""
    try:
        file = (folder / _LOCK).open("w")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _commit(files: list[tuple[Path, Path]], obsolete: Path) -> None:
    for unfinished, path in files:
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
    if files:
        folder = os.open(files[0][1].parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    obsolete.unlink(missing_ok=True)


def _header(streams: Mapping[str, Activations], num_samples: int) -> bytes:
    """The head of a safetensors file; streams that are one and the same are there once, under the first name."""
    places: dict[int, list[int]] = {}
    entries: dict[str, Any] = {}
    end = 0
    for name, stream in streams.items():
        if id(stream) not in places:
            num_bytes = num_samples * stream.shape[1] * stream.shape[2] * stream.dtype.itemsize
            places[id(stream)] = [end, end + num_bytes]
            end += num_bytes
            shape = [num_samples, *stream.shape[1:]]
            entries[name] = {"dtype": _DTYPES[stream.dtype], "shape": shape, "data_offsets": places[id(stream)]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head
