"""Tiny random models of every supported family: two or four layers, seconds to prune."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from barber.model.families import family_of
from barber.model.sources import RandomModel

CPU = torch.device("cpu")
VOCABULARY = 96

WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_WIDTHS = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: What a family needs beside the widths above; "TYPE/VARIANT" is one more shape of the same family.
CONFIGS: dict[str, dict[str, object]] = {
    "cohere": {},
    "exaone4": {"sliding_window": 8, "num_hidden_layers": 4, "sliding_window_pattern": 2},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 7},
    "glm": {"head_dim": 8},
    "gpt2": _GPT2_WIDTHS,
    "gpt_neox": {},
    "gpt_neox/sequential": {"use_parallel_residual": False},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 4.0},
    "helium": {"head_dim": 8},
    "llama": {},
    "ministral": {"head_dim": 8, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "olmo": {},
    "olmo/clipped": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "num_hidden_layers": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt/post-norm": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {},
    "stablelm/parallel": {"use_parallel_residual": True},
    "starcoder2": {"sliding_window": 8},
}


def _descriptions() -> list[str]:
    names: list[str] = []
    for name in sorted(CONFIGS, key=lambda name: name != "llama"):
        own = family_of(config(name)) not in [family_of(config(other)) for other in names]
        if own or "/" in name:
            names.append(name)
    return names


def config(name: str = "llama", **changes: object):
    """The tiny config of a family, or of a variant of it."""
    model_type = name.split("/")[0]
    own = CONFIGS[name]
    widths = {} if model_type == "gpt2" else WIDTHS
    return AutoConfig.for_model(model_type, **widths | own | changes)


def model(name: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny model with random weights, some of them large, as in trained models."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(name, **changes))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.1 * (1 + 3 * (torch.rand_like(parameter) > 0.97)))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def tokens(num_samples: int = 6, length: int = 16, seed: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Random token ids (N, L)."""
    return torch.randint(3, vocabulary, (num_samples, length), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerBase:
    """One that maps every byte to an id, with neither a BOS nor an end token."""
    made = RandomModel("llama").tokenizer()
    assert made is not None
    return made


#: One name for every description of a family that differs, and all variants; the other families are look-alikes.
DESCRIPTIONS = _descriptions()
