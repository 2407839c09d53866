"""GGUF models inside installed Python packages: read as the Hugging Face folders that they are converted to, once."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from barber.errors import UserError
from barber.model.sources import Pretrained, save
from barber.runtime.cache import cache_folder
from barber.runtime.files import folder_written_whole, remove, sweep
from barber.runtime.locks import SharedLock
from barber.runtime.seals import DamagedError, Seal

log = logging.getLogger("barber")

# In the folder, with the digests of all else in it.
_COMPLETE = "converted.json"


@dataclass(frozen=True)
class Packaged:
    """A GGUF model inside installed Python packages, converted once and kept as a Hugging Face folder.

    The conversion takes half a minute; its result goes to `BARBER_CACHE`, by default ~/.cache/barber.

    Args:
        package: name of the Python package.
        file: the GGUF file in it.
        install: the command that installs the package, for the error message.
        parts: PACKAGE/FILE in the order in which they make up the GGUF file, where a registry's limit on a package's
            size has it cut; None: it is whole in `package`.
        base_model, license: the repository on the hub that it was made of, and the licence there, for model cards.
    """

    package: str
    file: str
    install: str
    parts: Sequence[str] | None = None
    base_model: str | None = None
    license: str | None = None

    def __str__(self) -> str:
        return Path(self.file).stem

    def config(self) -> PreTrainedConfig:
        return self._folder().config()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self._folder().tokenizer()

    def load(self) -> PreTrainedModel:
        return self._folder().load()

    def folder(self, scratch: Path) -> tuple[Path, torch.dtype | None]:
        return self._folder().folder(scratch)

    def _folder(self) -> Pretrained:
        parts = [self._find(part) for part in self.parts or [f"{self.package}/{self.file}"]]
        size = sum(part.stat().st_size for part in parts)
        folder = cache_folder() / "models" / f"{Path(self.file).stem}-{size}"
        if not _is_whole(folder):
            if missing := [name for name in ("accelerate", "gguf") if find_spec(name) is None]:
                raise UserError(
                    f'is a GGUF model and needs {missing[0]}, install it with: pip install "llm-barber[demo]"',
                    field="package",
                )
            with SharedLock(cache_folder() / ".locks" / folder.name, f"{folder}, the converted model").writing():
                if not _is_whole(folder):  # as it may be by now
                    if os.path.lexists(folder):
                        log.warning("%s, the converted model, is damaged; it is converted anew.", folder)
                        remove(folder)
                    _convert(parts, Path(self.file).name, folder)
        return Pretrained(str(folder), local=True)

    def files(self) -> list[Path]:
        return self._folder().files()

    def _find(self, part: str) -> Path:
        package, _, file = part.partition("/")
        spec = find_spec(package)
        places = (spec.submodule_search_locations if spec else None) or []
        if found := next((path for place in places if (path := Path(place) / file).is_file()), None):
            return found
        raise UserError(f"needs the Python package {package}, install it with: {self.install}", field="package")


def _convert(parts: Sequence[Path], name: str, folder: Path) -> None:
    """Dequantise a GGUF file into a Hugging Face folder, which appears whole or not at all.

    Args:
        parts: the file, or the pieces it was cut into.
        name: what it is called.
        folder: where the model goes; nobody else writes there meanwhile.
    """
    log.info("Converting %s to %s, once; this takes half a minute.", name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, f"{folder.name}.*")
    with folder_written_whole(folder) as unfinished:
        gguf = parts[0] if len(parts) == 1 else _joined(parts, unfinished / name)
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        model.hf_quantizer = None  # the weights are plain floats now; with it save_pretrained refuses
        del model.config.quantization_config
        model.config._name_or_path = Path(name).stem
        save(model, unfinished)
        AutoTokenizer.from_pretrained(**where).save_pretrained(unfinished)
        if len(parts) > 1:
            gguf.unlink()
        files = {file.name: file for file in sorted(unfinished.iterdir())}
        Seal.of(None, files).write(unfinished / _COMPLETE)


def _is_whole(folder: Path) -> bool:
    """Whether a converted model is there as it was written; it is read for that once in a process."""
    try:
        return _was_whole(folder, (folder / _COMPLETE).stat().st_mtime_ns)
    except OSError:
        return False


@cache
def _was_whole(folder: Path, written_ns: int) -> bool:
    try:
        Seal.read(folder / _COMPLETE).require(folder)
    except DamagedError:
        return False
    return True


def _joined(parts: Sequence[Path], file: Path) -> Path:
    with file.open("wb") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole)
    return file
