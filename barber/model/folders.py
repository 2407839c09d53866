"""The folder that a model is read from: which files are the model's, and whether they are what they say.

Both loaders ask here before they read a weight, so that in memory and streamed the same folders are taken and refused.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel

from barber.errors import UserError, first_sentence

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Whose presence says that the weights beside them are no plain numbers; and a quantiser's parts of a weight.
_QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_QUANTISED_KEYS = ("quantization_config", "compression_config")
_QUANTISED_PART = re.compile(r"\.(\w*scales?(_\w+)?|qweight|qzeros|weight_packed|weight_zero_point|SCB|weight\.\w+)$")
_PLAIN = ("F64", "F32", "F16", "BF16")


def check_folder(folder: Path) -> None:
    """Refuse a folder that is none of a Hugging Face model with plain weights as safetensors; no weight is read.

    Raises:
        UserError: the folder or a file of it is missing, damaged or of another kind; the index names files elsewhere;
            the weights are quantised; an adapter lies beside them.
    """
    if not folder.is_dir():
        raise _no_model(f"{folder} is not there")
    if (adapter := folder / "adapter_config.json").exists():
        raise UserError(
            f"must be a model without an adapter beside it; there is {adapter}: merge the adapter into the model first "
            "(merge_and_unload of peft), or remove it",
            field="path",
        )
    if not (folder / "config.json").is_file():
        raise _no_model(f"{folder} has no config.json")
    config = _mapping(folder / "config.json")
    for key in _QUANTISED_KEYS:
        if found := config.get(key):
            method = found.get("quant_method", "") if isinstance(found, dict) else ""
            raise _quantised(f"{folder / 'config.json'} has {method and method + ' as its '}{key}")
    if other := next((folder / name for name in _QUANTISED_FILES if (folder / name).exists()), None):
        raise _quantised(f"there is {other}")
    if (file := folder / "generation_config.json").exists():
        _mapping(file)
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # whatever its values lead to
            raise _unreadable(file, error) from error
    for file in files_of(folder):
        for name, (dtype, _) in _head(file).items():
            if _QUANTISED_PART.search(name) or (name.endswith("weight") and dtype not in _PLAIN):
                raise _quantised(f"{file} has {name} ({dtype})")


def check_shapes(folder: Path, model: PreTrainedModel, renamed: Mapping[str, str]) -> None:
    """Refuse a folder whose tensors are of other shapes than the model's, which may be on the meta device.

    Args:
        renamed: names in the model, and what files call them.

    Raises:
        UserError: the first such tensor. One that is not there is left to the loaders.
    """
    heads = {name: (file, shape) for file in files_of(folder) for name, (_, shape) in _head(file).items()}
    for name, tensor in model.state_dict().items():
        stored = stored_name(name, heads, model.base_model_prefix, renamed)
        if stored is not None and heads[stored][1] != list(tensor.shape):
            raise UserError(
                f"must hold weights of the shapes that its config.json gives; {stored} in {heads[stored][0]} is "
                f"{heads[stored][1]} and not {list(tensor.shape)}",
                field="path",
            )


def stored_name(name: str, stored: Collection[str], base: str, renamed: Mapping[str, str]) -> str | None:
    """What files call a tensor of the model; None where they have none.

    Args:
        stored: the names in the files.
        base: the prefix that these may lack, or have where the model has none.
        renamed: names in the model, and what files call them.
    """
    candidates = (name, renamed.get(name, name), name.removeprefix(f"{base}."), f"{base}.{name}")
    return next((candidate for candidate in candidates if candidate in stored), None)


def holds_weights(folder: Path) -> bool:
    """Whether there are safetensors that transformers would read."""
    return any((folder / name).is_file() for name in (_SINGLE, _INDEX))


def files_of(folder: Path) -> list[Path]:
    """The files with the model's weights, those that transformers reads: one, or those that its index names.

    Raises:
        UserError: there are none, or the index names a file that is not there or outside of the folder.
    """
    if not holds_weights(folder):
        raise UserError(f"must hold the weights as safetensors; {folder} has neither {_SINGLE} nor {_INDEX}", "path")
    if (single := folder / _SINGLE).is_file():
        return [single]
    index = folder / _INDEX
    names = _mapping(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"must have an index whose weight_map gives every tensor its file; {index} has none", "path")
    for name in sorted(set(names.values())):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"must have an index that names files of the folder; {index} names {name}", field="path")
        if not (folder / name).is_file():
            raise UserError(f"must hold the files that {index} names; {name} is not there", field="path")
    return [folder / name for name in sorted(set(names.values()))]


def _head(file: Path) -> dict[str, tuple[str, list[int]]]:
    """The dtype and the shape of every tensor in a file; to open it finds out whether it was cut off."""
    try:
        with safe_open(file, framework="pt") as opened_file:
            slices = {name: opened_file.get_slice(name) for name in opened_file.keys()}  # noqa: SIM118
            return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        reason = first_sentence(error)
        raise UserError(f"must hold the weights as safetensors; {file} is none ({reason})", "path") from error


def _mapping(file: Path) -> dict[str, Any]:
    """What a JSON file says, which has to be keys and values."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refused)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(content, dict):
        raise _no_model(f"{file} holds no keys and values")
    return content


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON's")


def _unreadable(file: Path, error: Exception) -> UserError:
    return _no_model(f"{file} cannot be read: {first_sentence(error)}")


def _no_model(what: str) -> UserError:
    return UserError(f"must be a folder with a Hugging Face model; {what}", field="path")


def _quantised(what: str) -> UserError:
    return UserError(f"must hold plain weights, not quantised ones; {what}: dequantise the model first", field="path")
