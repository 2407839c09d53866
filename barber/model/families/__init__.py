"""The model families that Barber prunes: one file a Hugging Face `model_type`, each holding a `FAMILY`.

A family is data: where the decoder layers are, which submodules of a layer make up its blocks, and what the linears
in them are for. Residuals, masks, positions and the order of all that are the layer's own business and are left to its
own forward. What a layer does not have is passed over: so one family can describe layers that differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Literal, get_args

from transformers import PreTrainedConfig

from barber.errors import UserError

Role = Literal[
    "query",
    "key",
    "value",
    "output",
    "gate",
    "up",
    "down",
    "router",
    "experts",
    "shared_gate",
    "shared_up",
    "shared_down",
]
Roles = dict[str, Role | tuple[Role, ...]]

# What is fed before what: linears of one of these need no answer of one another.
PHASES: tuple[tuple[Role, ...], ...] = (
    ("query", "key", "value"),
    ("output",),
    ("gate", "up", "shared_gate", "shared_up"),
    ("down", "shared_down"),
)


@dataclass(frozen=True)
class Heads:
    """The heads of an attention.

    Args:
        queries: how many heads of queries there are.
        groups: how many heads of keys and of values; as many neighbouring heads of queries share each of them.
        dim: the size of a head.
    """

    queries: int
    groups: int
    dim: int


@dataclass(frozen=True)
class Family:
    """Where to find a family's decoder layers and their blocks, and what is what inside of them.

    All paths but `layers` begin at a layer. A linear without a role is pruned like any other.

    Args:
        layers: path from the causal language model to its list of decoder layers.
        blocks: by name, in the order in which a layer runs them, a chain of submodules: the block's input is that of
            the first, its output that of the last, and what lies between is applied in order. Every linear in them is
            pruned.
        roles: what a linear is for, by its path. A tuple is a fused linear: the rows of one role after those of the
            other. `experts` is the module that holds a layer's experts; an MLP that is not gated has `up` and `down`.
        norms: by block, the norm whose output is all that the block is fed, and which feeds nothing but blocks: it can
            be folded into the block's first linears. Where a layer does not have it, the block runs in parallel with
            the one before and shares that one's norm.
        norms_if: the field of the config that says whether these norms do stand before the blocks; None: they do.
        interleaved: fused linears whose roles take turns head by head: the queries of the first group, its key, its
            value, the queries of the second.
        never: linears that are not pruned; routers are not anyway.
        heads: the field of the config with the number of heads of queries.
        groups: that with the number of heads of keys and values; without it there are as many as of queries.
        head_dim: that with the size of a head; without it the heads of queries share the hidden size.
        stored_as: tensors outside of the layers that files call by another name than the model.

    Raises:
        UserError: paths or names that do not fit together.
    """

    layers: str
    blocks: Mapping[str, tuple[str, ...]]
    roles: Roles = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    norms_if: str | None = None
    interleaved: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    heads: str = "num_attention_heads"
    groups: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    stored_as: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roots = tuple(f"{root}." for chain in self.blocks.values() for root in chain)
        for path in (*self.roles, *self.never):
            if not f"{path}.".startswith(roots):
                raise UserError(f"must be inside of one of the family's blocks, not {path}", field="roles")
        for role in (role for path in self.roles for role in self.roles_of(path)):
            if role not in get_args(Role):
                raise UserError(f"must be {', '.join(get_args(Role))}, not {role}", field="roles")
        for path in self.interleaved:
            if len(self.roles_of(path)) < 2:
                raise UserError(f"must be linears with several roles, not {path}", field="interleaved")
        for name in self.norms:
            if name not in self.blocks:
                raise UserError(f"must be those of {', '.join(self.blocks)}, not of {name}", field="norms")

    def roles_of(self, path: str) -> tuple[Role, ...]:
        """The roles of a module of a layer, in the order of its rows."""
        roles = self.roles.get(path, ())
        return roles if isinstance(roles, tuple) else (roles,)

    def is_pruned(self, path: str) -> bool:
        """Whether a linear of a block may be pruned."""
        return path not in self.never and "router" not in self.roles_of(path)

    def norms_of(self, config: PreTrainedConfig) -> Mapping[str, str]:
        """The norms that can be folded into blocks, by the block's name."""
        return self.norms if self.norms_if is None or getattr(config, self.norms_if) else {}

    def heads_of(self, config: PreTrainedConfig) -> Heads:
        """The heads of a model's attention."""
        text = config.get_text_config()
        queries = getattr(text, self.heads)
        groups = getattr(text, self.groups, None) or queries
        return Heads(queries, groups, getattr(text, self.head_dim, None) or text.hidden_size // queries)


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
