"""Pruning as a function call, for notebooks and scripts."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from barber.checks import check_architecture, check_methods, check_tokens, resolve_device
from barber.decoder import Decoder
from barber.errors import UserError
from barber.patterns import Pattern
from barber.pruners import Pruner
from barber.rebuild import Barber
from barber.tensors import Tensor
from barber.walk import BlockResult, Walk


@dataclass(frozen=True)
class BlockReport:
    """One block in figures: what a line of layers.jsonl holds."""

    layer: int
    block: str
    sparsity: float
    exchanges: int
    loss_before: float | None
    loss_after: float | None
    seconds: float
    linears: dict[str, dict[str, int]]


@dataclass
class Report:
    """What pruning did to a model.

    Args:
        blocks: the blocks, in the order of the walk.
        seconds: time by phase of the walk.
    """

    blocks: list[BlockReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def linears(self) -> dict[str, dict[str, int]]:
        """Of every linear: its weights, the exact zeros among them, the pairs exchanged."""
        return {name: counts for block in self.blocks for name, counts in block.linears.items()}

    @property
    def weights(self) -> int:
        """Weights of all pruned linears."""
        return sum(counts["weights"] for counts in self.linears.values())

    @property
    def zeros(self) -> int:
        """Exact zeros among them."""
        return sum(counts["zeros"] for counts in self.linears.values())

    @property
    def exchanges(self) -> int:
        """Pairs of weights that the rebuilding exchanged."""
        return sum(block.exchanges for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """The share of exact zeros in all pruned linears."""
        return self.zeros / self.weights


def prune(
    model: PreTrainedModel,
    tokens_BL: Tensor,
    *,
    pattern: Pattern,
    pruner: Pruner,
    rebuild: Barber | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    on_block: Callable[[BlockReport, BlockResult], None] | None = None,
) -> Report:
    """Prune a model in place and, if asked, rebuild its masks block by block.

    Args:
        model: a causal language model of a supported family.
        tokens_BL: calibration samples, integer token ids.
        pattern: what the masks look like, `Unstructured(0.5)` or `NM(2, 4)`.
        pruner: the method of the initial masks, `Magnitude()`, `Wanda()`, `SparseGPT()`.
        rebuild: `Barber(...)`, or None to leave the initial masks.
        device: where to compute; one layer at a time is taken there. None: where the model is.
        batch_size: samples that go through a layer together; None: as many as fit comfortably.
        on_block: called with the report and the masks of every finished block.

    Raises:
        UserError: the arguments do not fit together; nothing has been changed then.
        NumericsError: NaN or infinite values; layers before the one it names are pruned.

    Example:
        >>> report = prune(model, tokens, pattern=NM(2, 4), pruner=Wanda(), rebuild=Barber(alpha=0.1))
        >>> report.sparsity
        0.5
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"must be at least 1, not {batch_size}", field="batch_size")
    check_methods(pattern, pruner, rebuild)
    check_architecture(model, pattern)
    check_tokens(tokens_BL, model.config, "tokens_BL")
    place = model.device if device is None else resolve_device(str(device))
    size = batch_size or fitting_batch_size(model.config, tokens_BL.shape[1], place)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        walk = Walk(model, tokens_BL.long(), pattern, pruner, rebuild, place, size)
        report = Report(seconds=walk.stopwatch.seconds)
        weights = {linear.name: linear for linear in Decoder(model).linears}
        for result in walk:
            counts = {}
            for linear in result.linears:
                stored_OI = weights[linear.name].weight_OI
                zeros = stored_OI.numel() - int(stored_OI.count_nonzero())
                counts[linear.name] = {
                    "weights": stored_OI.numel(),
                    "zeros": zeros,
                    "exchanges": linear.num_exchanged,
                }
            report.blocks.append(_report(result, counts))
            if on_block is not None:
                on_block(report.blocks[-1], result)
    finally:
        for module in training:
            module.training = True
    return report


def fitting_batch_size(config: PreTrainedConfig, seqlen: int, device: torch.device) -> int:
    """How many samples of `seqlen` tokens go through a block with its gradients in a tenth of the device's memory.

    At most 4096 tokens on a CPU, where more only fall out of the caches, and 32768 on a GPU. What is free at the moment
    is not asked: the same run on the same machine has to have the same batches, for the last bits depend on them.
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    inner = next((getattr(text, key) for key in ("intermediate_size", "ffn_dim", "n_inner") if _has(text, key)), None)
    heads = getattr(text, "num_attention_heads", 1)
    # float32 activations and their gradients: some ten of the hidden and six of the inner size a token, attention
    # weights of the plain (not fused) kernel twice
    bytes_per_sample = 4 * seqlen * (10 * hidden + 6 * (inner or 4 * hidden) + 2 * heads * seqlen)
    if device.type == "cuda":
        memory, most_tokens = torch.cuda.get_device_properties(device).total_memory, 32768
    else:
        memory, most_tokens = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 4096
    return max(1, min(int(memory) // 10 // int(bytes_per_sample), most_tokens // seqlen))


def _has(config: PreTrainedConfig, key: str) -> bool:
    return isinstance(getattr(config, key, None), int)


def _report(result: BlockResult, counts: dict[str, dict[str, int]]) -> BlockReport:
    zeros, weights = (sum(count[key] for count in counts.values()) for key in ("zeros", "weights"))
    return BlockReport(
        layer=result.layer,
        block=result.block,
        sparsity=zeros / weights,
        exchanges=sum(count["exchanges"] for count in counts.values()),
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        seconds=round(result.seconds, 3),
        linears=counts,
    )
