"""How much goes through a layer together, by the memory that there is."""

import torch
from transformers import PreTrainedConfig

from barber.runtime.memory import physical_memory
from barber.runtime.tensors import Tensor


def fitting_batch_size(config: PreTrainedConfig, seqlen: int, device: torch.device) -> int:
    """How many samples of `seqlen` tokens go through a block with its gradients in a tenth of the device's memory.

    At most 1024 tokens on a CPU, where more only fall out of the caches, and 32768 on a GPU.
    """
    most_tokens = 32768 if device.type == "cuda" else 1024
    fitting = physical_memory(device) // 10 // _bytes_of_a_sample(config, seqlen)
    return max(1, min(fitting, most_tokens // seqlen))


def graphs_fit(config: PreTrainedConfig, tokens_NL: Tensor, device: torch.device) -> bool:
    """Whether a block's activations and gradients of all samples fit into a quarter of the device's memory."""
    num_samples, seqlen = tokens_NL.shape
    return num_samples * _bytes_of_a_sample(config, seqlen) < physical_memory(device) // 4


def _bytes_of_a_sample(config: PreTrainedConfig, seqlen: int) -> int:
    """float32 activations and their gradients: some ten of the hidden and six of the inner size a token, attention
    weights of the plain (not fused) kernel twice.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = next((getattr(text, key) for key in ("intermediate_size", "ffn_dim", "n_inner") if _has(text, key)), None)
    heads = int(getattr(text, "num_attention_heads", 1))
    return 4 * seqlen * (10 * hidden + 6 * (inner or 4 * hidden) + 2 * heads * seqlen)


def _has(config: PreTrainedConfig, key: str) -> bool:
    return isinstance(getattr(config, key, None), int)
