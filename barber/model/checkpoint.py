"""Finished layers on disk: a run that was killed goes on at its first unfinished layer.

A folder with, for every finished layer, its tensors (`layer-00007.safetensors`, the shard of a pruned model), both
masks and where the initially pruned weights differ (`pruned-00007.safetensors`), and its reports (`layer-00007.json`,
written last: the layer counts as finished from then on); and the activations that the next layer begins with. Every
file appears whole or not at all. The reports are the seal of the files that come with them: what is damaged is not
used, see `damage`.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed

from barber.errors import BarberError
from barber.model.difference import Difference
from barber.runtime.activations import Activations
from barber.runtime.distributed import Ranks
from barber.runtime.files import PutInPlaceLater, remove, written_beside
from barber.runtime.plain import typed
from barber.runtime.seals import DamagedError, Seal
from barber.runtime.tensors import Tensor, as_bytes, batches

# What the dense model holds, see `contents`.
MODEL = "model.json"


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
    _later: PutInPlaceLater = field(default_factory=PutInPlaceLater, repr=False)
    _written: list[tuple[Path, Path]] = field(default_factory=list, repr=False)
    _dense: dict[int, str] = field(default_factory=dict, repr=False)
    _intact: set[Path] = field(default_factory=set, repr=False)

    @property
    def num_finished(self) -> int:
        """How many layers are finished, from the first."""
        self.wait()
        return next((index for index in range(self.num_layers) if not self.marks(index)), self.num_layers)

    def marks(self, index: int) -> bool:
        """Whether there is the file that is written last of a layer."""
        return self._path("layer", index, "json").exists()

    def drop(self, begin: int) -> None:
        """Remove the layers from one on."""
        self.wait()
        if not self.ranks.leads:
            return
        for number in reversed(range(begin, self.num_layers + 1)):
            for place in ("layer", "json"), ("layer", "safetensors"), ("pruned", "safetensors"):
                remove(self._path(place[0], number, place[1]))
            if number > begin or not begin:
                remove(self._path("activations", number))

    def write_layer(self, index: int, tensors: Mapping[str, Tensor], dense: str) -> None:
        """Write a layer's tensors, as they are stored, by their names in the model.

        Args:
            dense: the digest of what they were made of.
        """
        if self.ranks.leads:
            self._dense[index] = dense
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
        files, self._written = self._written, []
        content = {"reports": reports, "dense": self._dense.pop(index, "")}

        def seal() -> tuple[Path, Path]:
            sealed = Seal.of(content, {path.name: unfinished for unfinished, path in files})
            return sealed.write_beside(self._path("layer", index, "json"))

        self._later.order(files, seal, obsolete)

    def wait(self) -> None:
        """Wait until everything that was written is on the disk; OSError where it could not be."""
        self._later.wait()

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer."""
        return load_file(self.layer_file(index))

    def layer_file(self, index: int) -> Path:
        """The file of the tensors of a layer."""
        return self._as_written("layer", index)

    def require(self, index: int, *kinds: str) -> None:
        """Compare files with the seal of a finished layer: its `layer`, what is `pruned`, the next one's `activations`.

        Raises:
            DamagedError: they are not what was written.
        """
        names = [self._path(kind, index + (kind == "activations")).name for kind in kinds]
        self._seal(index).require(self.folder, names)

    def dense(self, index: int) -> str:
        """The digest of what a finished layer was made of."""
        return typed(str, self._seal(index).content["dense"])

    def reports(self, index: int) -> list[dict[str, Any]]:
        """The reports of a finished layer's blocks."""
        return typed(list[dict[str, Any]], self._seal(index).content["reports"])

    def differences(self, index: int) -> dict[str, Difference]:
        """Where the initially pruned weights of a finished layer differ, by the name of the linear."""
        parts = load_file(self._as_written("pruned", index))
        names = [key.removeprefix("final.") for key in parts if key.startswith("final.")]
        return {name: Difference(*(parts[f"{part}.{name}"] for part in _PARTS)) for name in names}

    def holds(self, *streams: str) -> bool:
        """Whether there is nothing to be restored, or all of these streams, each for itself."""
        index = self.num_finished
        if index in (0, self.num_layers):
            return True
        with safe_open(self._path("activations", index), framework="pt") as file:
            return set(streams) <= set(file.keys())

    def restore(self, streams: Mapping[str, Activations], batch_size: int, num_samples: int) -> None:
        """Fill this process's share of the streams with what the first unfinished layer begins with."""
        index = self.num_finished
        if index == self.num_layers:
            return
        share = self.ranks.share(num_samples)
        distinct = {id(stream): stream for stream in streams.values()}
        with safe_open(self._path("activations", index), framework="pt") as file:
            held = set(file.keys())
            # One stream under several names is there under the first of those that it had when it was written. Where
            # one is left of two, it is that of the rebuilding, the later name.
            names = {id(stream): name for name, stream in streams.items() if name in held}
            for key, stream in distinct.items():
                values = file.get_slice(names[key])
                for batch in batches(stream.shape[0], batch_size):
                    stream[batch] = values[share.start + batch.start : share.start + batch.stop]

    def remove(self) -> None:
        """Delete the folder: what it was for is done."""
        self.wait()
        if self.ranks.leads:
            shutil.rmtree(self.folder)

    def _path(self, kind: str, index: int, ending: str = "safetensors") -> Path:
        return self.folder / f"{kind}-{index:05d}.{ending}"

    def _as_written(self, kind: str, index: int) -> Path:
        """A file of a finished layer, whose digest is compared when it is first asked for."""
        path = self._path(kind, index)
        if path not in self._intact:
            try:
                self.require(index, kind)
            except DamagedError as error:
                raise BarberError(f"{error}; the same command computes again what is needed") from error
            self._intact.add(path)
        return path

    def _seal(self, index: int) -> Seal:
        self.wait()
        return Seal.read(self._path("layer", index, "json"))

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        with written_beside(path) as unfinished:
            write(unfinished)
        self._written.append((unfinished, path))

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
