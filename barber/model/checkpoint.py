"""Finished layers on disk: a run that was killed goes on at its first unfinished layer.

A folder with, for every finished layer, its tensors (`layer-00007.safetensors`, the shard of a pruned model), both
masks and where the initially pruned weights differ (`pruned-00007.safetensors`), and its reports (`layer-00007.json`,
written last: the layer counts as finished from then on); and the activations that the next layer begins with. Every
file appears whole or not at all.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import distributed

from barber.errors import UserError
from barber.model.difference import Difference
from barber.runtime.activations import Activations
from barber.runtime.distributed import Ranks
from barber.runtime.files import PutInPlaceLater, written_beside
from barber.runtime.tensors import Tensor, as_bytes, batches


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
        files, self._written = self._written, []
        self._later.order(files, obsolete)

    def wait(self) -> None:
        """Wait until everything that was written is on the disk.

        Raises:
            OSError: it could not be.
        """
        self._later.wait()

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


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"hydra.run.dir holds an unfinished run, but {path} cannot be read ({error}); "
            f"remove {path.parent} to begin anew"
        ) from error


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
