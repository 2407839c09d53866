"""Where models come from: the hub, a local folder, a package (see `gguf`), or a random tiny one.

Every source gives its config first, which is cheap, so that a run is checked before any weight is read.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from barber.errors import UserError, first_sentence
from barber.model.families import family_of
from barber.model.folders import check_folder, check_shapes, holds_weights
from barber.model.names import own_name
from barber.runtime.files import writing
from barber.runtime.hub import offline_if_unreachable
from barber.runtime.tensors import Tensor

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSource(Protocol):
    """A model that can be loaded; nothing is read before it is asked for. str(source) is what people call it."""

    def config(self) -> PreTrainedConfig:
        """The architecture, without any weight."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, or None where the model has none."""
        ...

    def load(self) -> PreTrainedModel:
        """The model on the CPU, in evaluation mode."""
        ...

    def folder(self, scratch: Path) -> tuple[Path, torch.dtype | None]:
        """A folder with the weights as safetensors, and the dtype that was asked for; `scratch` may be written to."""
        ...

    def files(self) -> list[Path]:
        """The files with the weights, as far as they are on this machine; none of a model that is made."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """A model of the Hugging Face hub or in a local folder; safetensors only.

    Args:
        path: hub id ("huggyllama/llama-7b") or folder. With `local`, a folder and nothing else.
        local: look nowhere but in the folder.
        revision: branch, tag or commit of the hub repository.
        dtype: dtype of the weights; `auto` is the checkpoint's own.
        trust_remote_code: run the repository's own Python code.
    """

    path: str
    local: bool = False
    revision: str | None = None
    dtype: Dtype = "auto"
    trust_remote_code: bool = False

    def __str__(self) -> str:
        return own_name(self.path) if self.local else self.path

    def config(self) -> PreTrainedConfig:
        if self.local:
            check_folder(Path(self.path))
        try:
            with self._hub():
                config = AutoConfig.from_pretrained(self.path, **self._where())
        except Exception as error:  # whatever its values lead to: numbers that are texts, a division by zero
            raise UserError(self._cannot("config", error), field="path") from error
        assert isinstance(config, PreTrainedConfig)
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        if self.local and not any((Path(self.path) / name).exists() for name in _TOKENIZER_FILES):
            return None
        try:
            with self._hub():
                tokenizer = AutoTokenizer.from_pretrained(self.path, **self._where())
        except Exception as error:  # whatever its files lead to
            raise UserError(self._cannot("tokenizer", error), field="path") from error
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return tokenizer

    def load(self) -> PreTrainedModel:
        dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        folder = self._at_hand()
        if self.local or holds_weights(folder):  # others on the hub transformers has converted there
            check_folder(folder)
            config = self.config()
            check_shapes(folder, skeleton(config), family_of(config).stored_as)
        try:
            with self._hub():
                model, found = AutoModelForCausalLM.from_pretrained(
                    self.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **self._where()
                )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(self._cannot("weights", error), field="path") from error
        if found["missing_keys"]:  # transformers fills them with random numbers
            missing = min(found["missing_keys"])
            raise UserError(f"must hold every weight of the model; {self.path} has no {missing}", field="path")
        assert isinstance(model, PreTrainedModel)
        return model.eval()

    def folder(self, scratch: Path) -> tuple[Path, torch.dtype | None]:
        folder = self._at_hand()
        check_folder(folder)
        return folder, None if self.dtype == "auto" else getattr(torch, self.dtype)

    def _at_hand(self) -> Path:
        """The folder; that of a repository is fetched first."""
        if self.local or Path(self.path).is_dir():  # as transformers has it
            return Path(self.path)
        # with the card, for its licence
        wanted, others = (
            ["*.safetensors", "*.json", "README.md"],
            ["consolidated*", "*/*"],
        )  # of Mistral's own programs, of others
        try:
            with self._hub():
                return Path(
                    snapshot_download(self.path, revision=self.revision, allow_patterns=wanted, ignore_patterns=others)
                )
        except (OSError, ValueError) as error:
            raise UserError(self._cannot("weights", error), field="path") from error

    def files(self) -> list[Path]:
        folder = Path(self.path)
        if not self.local:
            try:
                folder = Path(snapshot_download(self.path, revision=self.revision, local_files_only=True))
            except (OSError, ValueError):
                return []
        return sorted(folder.glob("*.safetensors"))

    def _where(self) -> dict[str, Any]:
        where: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.local:
            return where | {"local_files_only": True}
        return where | ({"revision": self.revision} if self.revision else {})

    def _hub(self) -> AbstractContextManager[None]:
        return nullcontext() if self.local else offline_if_unreachable()

    def _cannot(self, what: str, error: Exception) -> str:
        reason = first_sentence(error)
        if self.local:
            return f"must be a folder with a Hugging Face model; the {what} in {self.path} cannot be read: {reason}"
        return (
            f"is {self.path}, whose {what} cannot be fetched from the hub: check the name, the network and your access "
            f"to it, or download it elsewhere and use model=local model.path=FOLDER ({reason})"
        )


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class RandomModel:
    """A model with random weights and a tokenizer of single bytes, for tests and for trying a configuration.

    Args:
        model_type: the Hugging Face model type.
        settings: entries of its config; the vocabulary has at least 256 entries, one a byte.
        seed: of the weights.
    """

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        return f"a random {self.model_type} model"

    def config(self) -> PreTrainedConfig:
        try:
            return AutoConfig.for_model(self.model_type, **self.settings)
        except ValueError as error:
            raise UserError(
                f"must be a Hugging Face model type, not {self.model_type!r}", field="model_type"
            ) from error
        except Exception as error:  # whatever its values lead to: texts for numbers, a division by zero
            reason = first_sentence(error.__cause__ or error)
            raise UserError(f"must suit the model type {self.model_type} ({reason})", field="settings") from error

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    def load(self) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(self.config())
        assert isinstance(model, PreTrainedModel)
        return model.eval()

    def folder(self, scratch: Path) -> tuple[Path, torch.dtype | None]:
        model = self.load()
        with writing(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
            save(model, scratch)
        return scratch, None

    def files(self) -> list[Path]:
        return []


_MOST_LAYERS = 1000


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config with every weight on the meta device: shapes and names, no memory.

    Raises:
        UserError: the config is of no model.
    """
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if num_layers > _MOST_LAYERS:  # an hour for a number that is none of a model's
        raise UserError(f"no model can be built from the config: it has {num_layers} layers, of {_MOST_LAYERS} at most")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # padding outside of the vocabulary, attention that is not installed
        raise UserError(f"no model can be built from the config: {first_sentence(error)}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def hollow(config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a config with its weights on the meta device and its buffers (rotary tables) in memory."""

    def to_meta(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    registration = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    finally:
        registration.remove()
    assert isinstance(model, PreTrainedModel)
    return model


def untied(model: PreTrainedModel, without: Sequence[str] = ()) -> dict[str, Tensor]:
    """The state dict less the tensors whose names begin with one of `without`, each stored tensor once."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if any(name.startswith(f"{prefix}.") for prefix in without) or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.cpu().contiguous()
    return kept


def save_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write all of a model but its weights, as `save_pretrained` does."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a model; `save_pretrained` would do so in the first of several processes only."""
    save_file(untied(model), folder / "model.safetensors", {"format": "pt"})
    save_configs(model, folder)
