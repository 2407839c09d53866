"""What a run leaves of the pruned model: a Hugging Face folder, or the masks alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from barber.errors import UserError
from barber.model.difference import Difference
from barber.model.weights import Weights
from barber.run.reading import is_unfinished
from barber.runtime.files import folder_written_whole, remove_whole, written_whole
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class HuggingFaceFolder:
    """The pruned model with its tokenizer and a model card, as safetensors, in `model/` of the run folder."""

    def check(self, out: Path, digest: str) -> None:
        """Refuse a run folder where an earlier run left its model: it is not ours to replace.

        That of a run which was killed after it had written its model, and which goes on now, is.

        Args:
            digest: of the run's config.
        """
        if (out / "model").exists() and not is_unfinished(out, digest):
            raise UserError(
                f"hydra.run.dir must not hold an exported model, but there is {out / 'model'}; choose another"
            )

    def save(self, weights: Weights, tokenizer: PreTrainedTokenizerBase | None, card: str, out: Path) -> Path:
        """Write the folder, whole or not at all; returns it."""
        if (out / "model").exists():  # of a run that was killed a moment later, see `check`
            remove_whole(out / "model")
        with folder_written_whole(out / "model") as unfinished:
            weights.write(unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
            (unfinished / "README.md").write_text(card, encoding="utf-8")
        return out / "model"


@dataclass(frozen=True)
class MaskFile:
    """The masks alone, in `masks.safetensors` of the run folder: `initial.NAME` and `final.NAME` of every linear.

    Each holds the pruned bits (1 = pruned) of the flattened weight (O, I), packed big-endian as numpy.packbits does.
    """

    def check(self, out: Path, digest: str) -> None:
        """Nothing to refuse: a file is replaced whole."""

    def collect(self, masks: dict[str, Tensor], differences: Mapping[str, Difference]) -> None:
        """Take in the masks of a layer's linears."""
        for name, difference in differences.items():
            masks[f"initial.{name}"], masks[f"final.{name}"] = difference.initial, difference.final

    def save(self, masks: dict[str, Tensor], out: Path) -> Path:
        """Write the file, whole or not at all; returns it."""
        path = out / "masks.safetensors"
        with written_whole(path) as unfinished:
            save_file(masks, unfinished)
        return path
