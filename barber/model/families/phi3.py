"""Phi 3 and 4: LLaMA with q, k, v in one linear and gate, up in another."""

from dataclasses import replace

from barber.model.families.llama import FAMILY as LLAMA

FAMILY = replace(
    LLAMA,
    roles={
        "self_attn.qkv_proj": ("query", "key", "value"),
        "self_attn.o_proj": "output",
        "mlp.gate_up_proj": ("gate", "up"),
        "mlp.down_proj": "down",
    },
)
