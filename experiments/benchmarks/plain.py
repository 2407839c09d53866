"""Wanda and LLM-Barber as a research script has them: the baseline of the benchmarks, and an oracle.

Unstructured, granularity `output`, weight-gradient metric, in float32. Sources: Wanda (arXiv 2306.11695, eq. 1) and
LLM-Barber (arXiv 2408.10631, sections 3.2 and 3.3). There are two passes over the layers, one sample at a time: the
first prunes the whole model, the second rebuilds its masks with a dense and a sparse copy side by side. Gradients come
from autograd on the weights, rows are sorted one by one. Nothing is shared with the package `barber`.

Names of tensors end in their shape: N samples, L tokens, D hidden, O outputs and I inputs of a linear, 1 one sample.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class Outcome:
    """What the two passes leave beside the pruned model.

    Args:
        pruned: the final mask (O, I) of every linear in the decoder layers by name, True where the weight is zeroed.
        seconds: time by step, "wanda" (with the copy of the model) and "rebuild".
    """

    pruned: dict[str, Tensor]
    seconds: dict[str, float]


@torch.no_grad()
def plain_wanda_barber(model: PreTrainedModel, tokens_NL: Tensor, sparsity: float, alpha: float) -> Outcome:
    """Prune a LLaMA in place with Wanda and rebuild its masks.

    Args:
        model: a `LlamaForCausalLM` in float32 with sdpa attention, all of it on one device.
        tokens_NL: calibration token ids.
        sparsity: the share of every output row that is pruned.
        alpha: the mask rebuilding ratio, the share of the pairs worth exchanging that is exchanged.

    Raises:
        ValueError: another kind of model.
    """
    config = model.config
    if config.model_type != "llama" or model.dtype != torch.float32 or config._attn_implementation != "sdpa":
        found = f"{config.model_type} in {model.dtype} with {config._attn_implementation}"
        raise ValueError(f"needs a llama in float32 with sdpa, not {found}")
    model.eval()
    start = now(model)
    dense = copy.deepcopy(model)
    samples, arguments = embed(model, tokens_NL.to(model.device))
    pruned = wanda(model, samples, arguments, sparsity)
    middle = now(model)
    rebuilt = rebuild(model, dense, samples, arguments, pruned, alpha)
    return Outcome(rebuilt, {"wanda": middle - start, "rebuild": now(model) - middle})


def embed(model: PreTrainedModel, tokens_NL: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The samples as the first layer gets them, each (1, L, D), and the other arguments of a layer.

    Without a mask sdpa is causal: the model's own forward leaves it out too.
    """
    samples = [model.model.embed_tokens(tokens_L[None]) for tokens_L in tokens_NL]
    position_ids_1L = torch.arange(tokens_NL.shape[1], device=tokens_NL.device)[None]
    position_embeddings = model.model.rotary_emb(samples[0], position_ids=position_ids_1L)
    return samples, {"attention_mask": None, "position_embeddings": position_embeddings}


def wanda(
    model: PreTrainedModel, samples: list[Tensor], arguments: dict[str, Any], sparsity: float
) -> dict[str, Tensor]:
    """Step 1: prune layer after layer, each with the outputs of the pruned layers before it; returns the masks."""
    pruned: dict[str, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        linears = linears_of(layer, f"model.layers.{index}")
        squares = {name: torch.zeros_like(linear.weight[0]) for name, linear in linears.items()}
        hooks = [linear.register_forward_hook(adding_squares(squares[name])) for name, linear in linears.items()]
        for x_1LD in samples:
            layer(x_1LD, **arguments)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            score_OI = linear.weight.abs() * (squares[name] / len(samples)).sqrt()
            pruned[name] = lowest_of_rows(score_OI, sparsity)
            linear.weight[pruned[name]] = 0
        samples = [layer(x_1LD, **arguments) for x_1LD in samples]
    return pruned


def rebuild(
    sparse: PreTrainedModel,
    dense: PreTrainedModel,
    samples: list[Tensor],
    arguments: dict[str, Any],
    pruned: dict[str, Tensor],
    alpha: float,
) -> dict[str, Tensor]:
    """Step 2: rebuild the masks block after block, each with the outputs of the rebuilt layers before it.

    Returns the new masks.
    """
    rebuilt: dict[str, Tensor] = {}
    for index, (layer, dense_layer) in enumerate(zip(sparse.model.layers, dense.model.layers, strict=True)):
        for block in ("self_attn", "mlp"):
            dense_linears = linears_of(getattr(dense_layer, block), f"model.layers.{index}.{block}")
            squared_gradients = {name: torch.zeros_like(linear.weight) for name, linear in dense_linears.items()}
            for linear in dense_linears.values():
                linear.weight.requires_grad_(True)
            for hidden_1LD in samples:
                x_1LD = input_of(layer, block, hidden_1LD, arguments)
                y_sparse_1LD = run(layer, block, x_1LD, arguments)
                with torch.enable_grad():
                    y_dense_1LD = run(dense_layer, block, x_1LD, arguments)
                    loss = (y_dense_1LD - y_sparse_1LD).square().mean()
                    loss.backward()
                for name, linear in dense_linears.items():
                    squared_gradients[name] += linear.weight.grad**2
                dense_layer.zero_grad()
            for name, linear in linears_of(getattr(layer, block), f"model.layers.{index}.{block}").items():
                weight_OI = dense_linears[name].weight
                score_OI = weight_OI.abs() * (squared_gradients[name] / len(samples)).sqrt()
                rebuilt[name] = exchange_in_rows(score_OI, pruned[name], alpha)
                linear.weight.copy_(weight_OI.masked_fill(rebuilt[name], 0))
        samples = [layer(x_1LD, **arguments) for x_1LD in samples]
    return rebuilt


def lowest_of_rows(score_OI: Tensor, sparsity: float) -> Tensor:
    """Mark the int(I * sparsity) lowest scores of every row: (O, I). Ties go to the lower index."""
    pruned_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    for score_I, pruned_I in zip(score_OI, pruned_OI, strict=True):
        order_I = score_I.sort(stable=True).indices
        pruned_I[order_I[: int(len(score_I) * sparsity)]] = True
    return pruned_OI


def exchange_in_rows(score_OI: Tensor, pruned_OI: Tensor, alpha: float) -> Tensor:
    """In every row exchange the share alpha of the pairs (pruned, kept) in which the pruned one scores higher.

    Returns the new mask (O, I).
    """
    pruned_OI = pruned_OI.clone()
    for score_I, pruned_I in zip(score_OI, pruned_OI, strict=True):
        growth, loss = pruned_I.nonzero().flatten(), (~pruned_I).nonzero().flatten()
        growth = growth[score_I[growth].sort(descending=True, stable=True).indices]
        loss = loss[score_I[loss].sort(stable=True).indices]
        pairs = min(len(growth), len(loss))
        exchanged = int((score_I[growth[:pairs]] > score_I[loss[:pairs]]).sum().item() * alpha)
        pruned_I[growth[:exchanged]] = False
        pruned_I[loss[:exchanged]] = True
    return pruned_OI


def input_of(layer: nn.Module, block: str, hidden_1LD: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What a block of a layer gets, after its norm: (1, L, D)."""
    x_1LD = layer.input_layernorm(hidden_1LD)
    if block == "self_attn":
        return x_1LD
    return layer.post_attention_layernorm(hidden_1LD + run(layer, "self_attn", x_1LD, arguments))


def run(layer: nn.Module, block: str, x_1LD: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The output of a block of a layer: (1, L, D)."""
    return layer.self_attn(x_1LD, **arguments)[0] if block == "self_attn" else layer.mlp(x_1LD)


def adding_squares(sum_I: Tensor) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    """A forward hook that adds the squares of a linear's input, over its tokens, to `sum_I`."""

    def hook(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
        sum_I.add_(inputs[0].square().sum(dim=(0, 1)))

    return hook


def linears_of(module: nn.Module, name: str) -> dict[str, nn.Linear]:
    """The linears inside a module by their name in the model."""
    return {f"{name}.{inner}": child for inner, child in module.named_modules() if isinstance(child, nn.Linear)}


def now(model: PreTrainedModel) -> float:
    """The time in seconds, once the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
