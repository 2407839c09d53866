"""What a run leaves of the pruned model: a Hugging Face folder, or the masks alone."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from barber.errors import UserError
from barber.model.checkpoint import Difference
from barber.model.weights import Weights
from barber.run.record import Sparsity
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class HuggingFaceFolder:
    """The pruned model with its tokenizer and a model card, as safetensors, in `model/` of the run folder."""

    def check(self, out: Path) -> None:
        """Refuse a run folder where an earlier run left its model: it is not ours to replace."""
        if (out / "model").exists():
            raise UserError(
                f"hydra.run.dir must not hold an exported model, but there is {out / 'model'}; choose another"
            )

    def save(self, weights: Weights, tokenizer: PreTrainedTokenizerBase | None, card: str, out: Path) -> Path:
        """Write the folder, whole or not at all; returns it."""
        folder = out / "model"

        def write(unfinished: Path) -> None:
            weights.write(unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
            (unfinished / "README.md").write_text(card, encoding="utf-8")

        _write_whole(folder, write)
        return folder


@dataclass(frozen=True)
class MaskFile:
    """The masks alone, in `masks.safetensors` of the run folder: `initial.NAME` and `final.NAME` of every linear.

    Each holds the pruned bits (1 = pruned) of the flattened weight (O, I), packed big-endian as numpy.packbits does.
    """

    def check(self, out: Path) -> None:
        """Nothing to refuse: a file is replaced whole."""

    def collect(self, masks: dict[str, Tensor], differences: Mapping[str, Difference]) -> None:
        """Take in the masks of a layer's linears."""
        for name, difference in differences.items():
            masks[f"initial.{name}"], masks[f"final.{name}"] = difference.initial, difference.final

    def save(self, masks: dict[str, Tensor], out: Path) -> Path:
        """Write the file, whole or not at all; returns it."""
        path = out / "masks.safetensors"
        unfinished = out / ".masks.safetensors.unfinished"
        try:
            save_file(masks, unfinished)
            unfinished.chmod(0o666 & ~_umask())
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path


def model_card(name: str, base: str, pattern: str, sparsity: Sparsity, config_yaml: str, update: str = "") -> str:
    """The README.md of a pruned model: what it is, how it was made, and the exact config.

    Args:
        update: what gave the kept weights new values, if anything.
    """
    updated = f"\nWith reconstruction: the kept weights have new values, by {update}.\n" if update else ""
    return f"""---
library_name: transformers
tags:
- pruning
- sparsity
- llm-barber
---

# {name}

{base}, pruned to {pattern} sparsity: {sparsity.zeros:,} of the {sparsity.weights:,} weights in the linears of
its decoder layers are exactly zero ({sparsity.sparsity:.2%}). Embeddings, norms, biases and the language-model head
are dense.

Pruned in one shot, without retraining, with [LLM-Barber](https://arxiv.org/abs/2408.10631). The zeros are stored like
other weights: the folder is as large and the model as fast as the dense one unless a sparse kernel is used.
{updated}
## Config

```yaml
{config_yaml.rstrip()}
```
"""


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    for left in folder.parent.glob(f".{folder.name}.unfinished-*"):  # by a run that was killed here
        shutil.rmtree(left)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.unfinished-"))
    try:
        write(unfinished)
        # mkdtemp and safetensors give their work to the owner alone; others on the machine may want the model
        unfinished.chmod(0o777 & ~_umask())
        for file in unfinished.iterdir():
            file.chmod(0o666 & ~_umask())
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
