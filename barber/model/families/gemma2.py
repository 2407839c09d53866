"""Gemma 2: norms before and after each block, sliding and full attention taking turns."""

from dataclasses import replace

from barber.model.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, norms={"attention": "input_layernorm", "mlp": "pre_feedforward_layernorm"})
