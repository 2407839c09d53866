"""Initial masks kept across runs: a sweep over the rebuilding computes them once."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from barber.methods.block import Pruned
from barber.model.difference import packed
from barber.runtime.files import HeldFile, PutInPlaceLater, written_beside, written_whole
from barber.runtime.seals import DamagedError, Seal
from barber.runtime.tensors import Tensor

log = logging.getLogger("barber")


@dataclass
class InitialMasks:
    """The initially pruned linears of every decoder layer, in a folder with a file a layer, and its seal.

    A file has `mask.NAME`, the pruned bits packed, and `weight.NAME`, float32, of linears whose kept weights a pruner
    has updated; of others the kept weights are the dense ones.

    Args:
        folder: where the files are.
        complete: whether all of them are there, to be read; otherwise they are to be written.
    """

    folder: Path
    complete: bool
    _later: PutInPlaceLater = field(default_factory=PutInPlaceLater, repr=False)
    _failed: bool = False
    _written: set[int] = field(default_factory=set, repr=False)
    _held: list[HeldFile] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.complete:  # whoever removes the cache now does not remove them
            self._held = [HeldFile(file) for file in sorted(self.folder.glob("layer-*.safetensors"))]

    def read(self, index: int, dense_OI: Mapping[str, Tensor]) -> dict[str, Pruned]:
        """The linears of a layer, given their dense weights (float32) by name."""
        stored = load_file(self._held[index].path)
        found = {}
        for name, weight_OI in dense_OI.items():
            bits = np.unpackbits(stored[f"mask.{name}"].numpy(), count=weight_OI.numel())
            mask_OI = torch.from_numpy(bits).view(torch.bool).view(weight_OI.shape).to(weight_OI.device)
            updated_OI = stored.get(f"weight.{name}")
            if updated_OI is None:
                found[name] = Pruned.masking(weight_OI, mask_OI)
            else:
                found[name] = Pruned(mask_OI, updated_OI.to(weight_OI.device))
        return found

    def write(self, index: int, dense_OI: Mapping[str, Tensor], initial: dict[str, Pruned]) -> None:
        """Keep the linears of a layer; the file appears whole or not at all. A full disk costs a warning."""
        if self._failed:
            return
        tensors = {}
        for name, pruned in initial.items():
            tensors[f"mask.{name}"] = packed(pruned.mask_OI)
            if not torch.equal(pruned.weight_OI, Pruned.masking(dense_OI[name], pruned.mask_OI).weight_OI):
                tensors[f"weight.{name}"] = pruned.weight_OI.cpu().contiguous()
        with self._at_the_cost_of_a_warning():
            with written_beside(self._file(index)) as unfinished:
                save_file(tensors, unfinished)
            self._later.order([(unfinished, self._file(index))], lambda: self._sealed(index, unfinished))

    @property
    def seconds(self) -> float | None:
        """What it took to compute them, where that is known."""
        try:
            return float(json.loads(self._seconds.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def took(self, seconds: float) -> None:
        """Keep what it took to compute them: the times of runs that know them are not those of the method."""
        with suppress(OSError), written_whole(self._seconds) as unfinished:
            unfinished.write_text(json.dumps(seconds), encoding="utf-8")

    def has_all(self, num_layers: int) -> bool:
        """Whether every layer has its file, on the disk."""
        with self._at_the_cost_of_a_warning():
            self._later.wait()
        try:
            for index in range(num_layers):  # a run that was killed may have written some
                seal = Seal.read(self._seal(index))
                if index not in self._written:
                    seal.require(self.folder)
        except DamagedError:
            return False
        return True

    def _sealed(self, index: int, unfinished: Path) -> tuple[Path, Path]:
        seal = Seal.of(None, {self._file(index).name: unfinished})
        self._written.add(index)
        return seal.write_beside(self._seal(index))

    @contextmanager
    def _at_the_cost_of_a_warning(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            log.warning("The initial masks are not kept for other runs: %s", error)
            self._failed = True

    @property
    def _seconds(self) -> Path:
        return self.folder / "seconds.json"

    def _seal(self, index: int) -> Path:
        return self.folder / f"seal-{index:05d}.json"

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"
