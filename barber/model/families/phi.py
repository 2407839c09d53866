"""Phi 1 to 2: attention and MLP in parallel, from one norm."""

from dataclasses import replace

from barber.model.families.llama import FAMILY as LLAMA

FAMILY = replace(
    LLAMA,
    roles={
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.dense": "output",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
    },
)
