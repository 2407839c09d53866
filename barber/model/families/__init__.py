"""The model families that Barber prunes: one file a Hugging Face `model_type`, each holding a `FAMILY`.

A family is data: where the decoder layers are, and which submodules of a layer make up its two blocks. Norms,
residuals, masks and positions are the layer's own business and are left to its own forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules

from transformers import PreTrainedConfig

from barber.errors import UserError


@dataclass(frozen=True)
class Family:
    """Where to find a family's decoder layers and their blocks.

    Args:
        layers: path from the causal language model to its list of decoder layers.
        attention: the attention block, a chain of submodules of a layer: the block's input is that of the first, its
            output that of the last, and what lies between is applied in order. Every linear in them is pruned.
        mlp: the MLP block, likewise.
        stored_as: tensors outside of the layers that files call by another name than the model.
    """

    layers: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    stored_as: Mapping[str, str] = field(default_factory=dict)


def supported() -> list[str]:
    """The model types that have a file here."""
    return sorted(module.name for module in iter_modules(__path__))


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model's config.

    Raises:
        UserError: the model type is unknown, or a mixture of experts (whose experts are not linears of their own).
    """
    name = config.model_type
    if name in supported():
        family = import_module(f"barber.model.families.{name}").FAMILY
        assert isinstance(family, Family)
        return family
    kind = "is a mixture of experts, which Barber cannot prune yet" if _has_experts(config) else "is not supported"
    raise UserError(f"model type {name!r} {kind}; supported are {', '.join(supported())}")


def _has_experts(config: PreTrainedConfig) -> bool:
    text = config.get_text_config()
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, count, None) or 0) > 1 for count in counts) or hasattr(text, "ffn_config")
