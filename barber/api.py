"""Pruning as a function call, for notebooks and scripts."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from barber.errors import UserError
from barber.methods.patterns import Exactly, Pattern, Unstructured
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.model.checkpoint import Checkpoint
from barber.model.decoder import Decoder
from barber.model.difference import Difference
from barber.model.weights import InMemory, Weights
from barber.runtime.activations import DENSE_SETS, SETS, ActivationStore, Place
from barber.runtime.distributed import Ranks
from barber.runtime.memory import physical_memory
from barber.runtime.precision import Precision
from barber.runtime.tensors import Tensor
from barber.walk.allocation import Allocation, Setting, Watch
from barber.walk.checks import check_architecture, check_methods, check_tokens, resolve_device
from barber.walk.initial import InitialMasks
from barber.walk.loss_gradients import loss_gradients
from barber.walk.walk import BlockResult, Schedule, Walk

_BLOCKS_OF_A_LAYER = 2


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
        initial_seconds: the part of it that computing the initial masks took, where they were not known.
    """

    blocks: list[BlockReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    initial_seconds: float = 0.0

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
    rebuild: Rebuild | Sequence[Rebuild] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
    schedule: Schedule = "paper",
    activations: Place = "auto",
    scratch: Path | None = None,
    weights: Weights | None = None,
    checkpoint: Checkpoint | None = None,
    initial: InitialMasks | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    on_block: Callable[[BlockReport, BlockResult | None], None] | None = None,
    on_layer: Callable[[int, dict[str, Difference]], None] | None = None,
) -> Report:
    """Prune a model in place and, if asked, rebuild its masks block by block.

    Under torchrun, with a process group, every process takes its share of the samples; all end with the same masks.

    Args:
        model: a causal language model of a supported family.
        tokens_BL: calibration samples, integer token ids.
        pattern: what the masks look like, `Unstructured(0.5)` or `NM(2, 4)`.
        pruner: the method of the initial masks, `Magnitude()`, `Wanda()`, `SparseGPT()`.
        rebuild: `Barber(...)`, `Swaps()`, a list of steps, which may end with an update of the kept weights such as
            `LeastSquares()`, or None to leave the initial masks.
        device: where to compute; one layer at a time is taken there. None: where the model is.
        batch_size: samples that go through a layer together; None: as many as fit comfortably.
        precision: of the matrix products; None: float32 on a CPU, bfloat16 on a GPU.
        schedule: `paper`, or `interleaved`: the initial mask of a block is computed on the inputs that its rebuilding
            has, which saves a third of the work and gives other masks.
        activations: where the samples wait between two layers: `device`, `host`, `disk`, or `auto`: where they fit.
        scratch: a folder for the files of `disk`.
        weights: where the layers' weights are; None: in the model.
        checkpoint: gets every finished layer; those that it has are not computed again.
        patterns: of linears, by name, that have another than the rest, as `allocate` gives them.
        gradients: for pruners that ask for those of the language-model loss, by linear; None: they are computed.
        initial: the initial masks, if they are known, or a folder to keep them in; for `schedule="paper"`.
        on_block: called with the report and the masks of every finished block; without masks (None) where the
            checkpoint had it.
        on_layer: called with where the initially pruned weights of a finished layer differ from the final ones.

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
    steps = rebuild if isinstance(rebuild, Sequence) else () if rebuild is None else (rebuild,)
    check_methods(
        pattern, pruner, {"rebuild" if len(steps) == 1 else f"rebuild[{i}]": s for i, s in enumerate(steps)}, schedule
    )
    check_architecture(model, pattern)
    check_tokens(tokens_BL, model.config, "tokens_BL")
    Ranks.present().require_samples(len(tokens_BL))
    place = model.device if device is None else resolve_device(str(device))
    forward, _ = (precision or Precision()).on(place)
    size = batch_size or fitting_batch_size(model.config, tokens_BL.shape[1], place)
    begin = checkpoint.num_finished if checkpoint is not None else 0
    sets = SETS + (DENSE_SETS if any(step.needs.dense for step in steps) else 0)
    store = ActivationStore(activations, place, forward.dtype, scratch, sets)
    if gradients is None and pruner.gradient == "loss" and (initial is None or not initial.complete):
        gradients = loss_gradients(model, tokens_BL.long(), weights or InMemory(model), place, size, store)
    if weights is None:
        weights = InMemory(model, checkpoint)
        weights.restore()
    walk = Walk(
        model,
        tokens_BL.long(),
        pattern,
        pruner,
        steps,
        place,
        size,
        weights=weights,
        precision=precision or Precision(),
        store=store,
        schedule=schedule,
        keep_graphs=graphs_fit(model.config, tokens_BL, place),
        initial=initial,
        patterns=patterns or {},
        gradients=gradients or {},
        begin=begin,
        restore=partial(checkpoint.restore, batch_size=size, num_samples=len(tokens_BL)) if checkpoint else None,
    )
    blocks: list[BlockReport] = []
    for index in range(begin):
        assert checkpoint is not None
        for report in checkpoint.reports(index):
            blocks.append(BlockReport(**report))
            if on_block is not None:
                on_block(blocks[-1], None)
        if on_layer is not None:
            on_layer(index, checkpoint.differences(index))
    training = [module for module in model.modules() if module.training]
    model.eval()
    dtypes = {linear.name: linear.weight_OI.dtype for linear in Decoder(model).linears}
    layer: list[BlockResult] = []

    def take(result: BlockResult) -> None:
        blocks.append(_report(result))
        if on_block is not None:
            on_block(blocks[-1], result)
        layer.append(result)
        if len(layer) < _BLOCKS_OF_A_LAYER:
            return
        if checkpoint is not None or on_layer is not None:
            differences = _differences(layer, dtypes)
            if on_layer is not None:
                on_layer(result.layer, differences)
            if checkpoint is not None:
                reports = [asdict(block) for block in blocks[-_BLOCKS_OF_A_LAYER:]]
                checkpoint.finish_layer(result.layer, reports, differences, walk.streams, size, len(tokens_BL))
        layer.clear()

    try:
        deque(map(take, walk), maxlen=0)  # a loop's variable would hold a result, as large as the layer, too long
        if checkpoint is not None:
            checkpoint.wait()
    finally:
        for module in training:
            module.training = True
    return Report(blocks, walk.stopwatch.seconds, walk.initial_seconds)


def allocate(
    model: PreTrainedModel,
    tokens_BL: Tensor,
    *,
    allocation: Allocation,
    pattern: Unstructured,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
    activations: Place = "auto",
    scratch: Path | None = None,
    weights: Weights | None = None,
    watch: Watch | None = None,
) -> dict[str, Exactly]:
    """How many weights every linear of a dense model shall lose, for `prune(patterns=...)`.

    Args:
        allocation: `OWL()`, `ErrorCurves()`, `EvoPress()`.
        pattern: the sparsity of all of them together, which is exact to one weight.
        watch: told how much is done, and of how much.

    The others are those of `prune`.

    Raises:
        UserError: N:M, which stays uniform.
        NumericsError: NaN or infinite activations.
    """
    allocation.check(pattern)
    place = model.device if device is None else resolve_device(str(device))
    forward, _ = (precision or Precision()).on(place)
    setting = Setting(
        model,
        tokens_BL.long(),
        weights or InMemory(model),
        place,
        batch_size or fitting_batch_size(model.config, tokens_BL.shape[1], place),
        ActivationStore(activations, place, forward.dtype, scratch),
        forward,
        pattern.sparsity,
        Ranks.present(),
    )
    return {name: Exactly(count) for name, count in allocation.allocate(setting, watch).items()}


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


def _differences(layer: list[BlockResult], dtypes: dict[str, torch.dtype]) -> dict[str, Difference]:
    return {
        linear.name: Difference.between(
            (linear.initial.mask_OI, linear.initial.weight_OI),
            (linear.final.mask_OI, linear.final.weight_OI),
            dtypes[linear.name],
        )
        for result in layer
        for linear in result.linears
    }


def _has(config: PreTrainedConfig, key: str) -> bool:
    return isinstance(getattr(config, key, None), int)


def _report(result: BlockResult) -> BlockReport:
    counts = {
        linear.name: {
            "weights": linear.final.weight_OI.numel(),
            "zeros": linear.zeros,
            "exchanges": linear.num_exchanged,
        }
        for linear in result.linears
    }
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
