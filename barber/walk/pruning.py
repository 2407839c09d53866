"""A walk with all that goes with it: sizes that fit, a checkpoint, a report, and whoever follows it."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.methods.rebuild import Rebuild
from barber.model.checkpoint import Checkpoint
from barber.model.decoder import Decoder
from barber.model.difference import Difference
from barber.model.weights import InMemory, Weights
from barber.runtime.activations import DENSE_SETS, SETS, ActivationStore, Place
from barber.runtime.precision import Precision
from barber.runtime.tensors import Tensor
from barber.walk.initial import InitialMasks
from barber.walk.loss_gradients import loss_gradients
from barber.walk.report import BlockReport, Report
from barber.walk.sizes import fitting_batch_size, graphs_fit
from barber.walk.walk import BlockResult, Schedule, Walk

log = logging.getLogger("barber")

# Called with the report and the masks of every finished block; without masks (None) where the checkpoint had it.
OnBlock = Callable[[BlockReport, BlockResult | None], None]
# Called with where the initially pruned weights of a finished layer differ from the final ones.
OnLayer = Callable[[int, dict[str, Difference]], None]


@dataclass(frozen=True)
class Pruning:
    """What is done to a model and with what; its parts have been checked to fit together (`checks`).

    Args:
        pattern: of all linears, or of each by name, as an allocation gives them.
        steps: of the rebuilding, in order.
        device: where to compute; one layer at a time is taken there.
        batch_size: samples that go through a layer together; None: as many as fit comfortably.
        precision: of the matrix products.
        schedule: as in `Walk`.
        activations: where the samples wait between two layers.
        scratch: a folder for the files of `activations=disk`.
    """

    pattern: Pattern | Mapping[str, Pattern]
    pruner: Pruner
    steps: Sequence[Rebuild]
    device: torch.device
    batch_size: int | None = None
    precision: Precision = field(default_factory=Precision)
    schedule: Schedule = "paper"
    activations: Place = "auto"
    scratch: Path | None = None

    def carry_out(
        self,
        model: PreTrainedModel,
        tokens_NL: Tensor,
        weights: Weights | None = None,
        checkpoint: Checkpoint | None = None,
        initial: InitialMasks | None = None,
        on_block: OnBlock | None = None,
        on_layer: OnLayer | None = None,
    ) -> Report:
        """Prune the model in place.

        Args:
            tokens_NL: calibration samples, integer token ids, of all processes.
            weights: where the layers' weights are; None: in the model.
            checkpoint: gets every finished layer; those that it has are not computed again.
            initial: the initial masks, if they are known, or a folder to keep them in; for `schedule="paper"`.

        Raises:
            NumericsError: NaN or infinite values; layers before the one it names are pruned.
        """
        if weights is None:
            weights = InMemory(model, checkpoint)
        walk = self._walk(model, tokens_NL.long(), weights, checkpoint, initial)
        if checkpoint is not None and walk.has_two_streams and not checkpoint.holds("pruned", "rebuilt"):
            log.warning("The initial masks that the run began with have left the cache; all layers are computed again.")
            checkpoint.drop(0)
            walk.begin = 0
        weights.restore()
        followed = _Followed(model, walk, checkpoint, on_block, on_layer)
        followed.tell_of_finished()
        with evaluating(model):
            deque(map(followed.take, walk), maxlen=0)  # a loop's variable would hold a result, as large as the layer
            if checkpoint is not None:
                checkpoint.wait()
        if initial is not None and not initial.complete and not walk.begin:
            initial.took(walk.initial_seconds)
        return Report(followed.blocks, walk.stopwatch.seconds, walk.initial_seconds, walk.begin)

    def _walk(
        self,
        model: PreTrainedModel,
        tokens_NL: Tensor,
        weights: Weights,
        checkpoint: Checkpoint | None,
        initial: InitialMasks | None,
    ) -> Walk:
        num_samples, seqlen = tokens_NL.shape
        size = self.batch_size or fitting_batch_size(model.config, seqlen, self.device)
        forward, _ = self.precision.on(self.device)
        sets = SETS + (DENSE_SETS if any(step.needs.dense for step in self.steps) else 0)
        store = ActivationStore(self.activations, self.device, forward.dtype, self.scratch, sets)
        gradients: Mapping[str, Tensor] = {}
        if self.pruner.gradient == "loss" and (initial is None or not initial.complete):
            gradients = loss_gradients(model, tokens_NL, weights, self.device, size, store)
        return Walk(
            model,
            tokens_NL,
            self.pattern,
            self.pruner,
            self.steps,
            self.device,
            size,
            weights=weights,
            precision=self.precision,
            store=store,
            schedule=self.schedule,
            keep_graphs=graphs_fit(model.config, tokens_NL, self.device),
            initial=initial,
            gradients=gradients,
            begin=checkpoint.num_finished if checkpoint is not None else 0,
            restore=partial(checkpoint.restore, batch_size=size, num_samples=num_samples) if checkpoint else None,
        )


class _Followed:
    """A walk's results on their way to the report, to the checkpoint, and to whoever follows it."""

    def __init__(
        self,
        model: PreTrainedModel,
        walk: Walk,
        checkpoint: Checkpoint | None,
        on_block: OnBlock | None,
        on_layer: OnLayer | None,
    ) -> None:
        layers = Decoder(model).layers
        self.blocks: list[BlockReport] = []
        self._walk, self._checkpoint, self._on_block, self._on_layer = walk, checkpoint, on_block, on_layer
        self._num_blocks = [len(layer.blocks) for layer in layers]
        self._dtypes = {linear.name: linear.weight_OI.dtype for layer in layers for linear in layer.linears}
        self._layer: list[BlockResult] = []

    def tell_of_finished(self) -> None:
        """What the checkpoint had already."""
        for index in range(self._walk.begin):
            assert self._checkpoint is not None
            for report in self._checkpoint.reports(index):
                self._tell(BlockReport(**report), None)
            if self._on_layer is not None:
                self._on_layer(index, self._checkpoint.differences(index))

    def take(self, result: BlockResult) -> None:
        """A block is done."""
        self._tell(BlockReport.of(result), result)
        self._layer.append(result)
        count = self._num_blocks[result.layer]
        if len(self._layer) < count:
            return
        if self._checkpoint is not None or self._on_layer is not None:
            differences = self._differences()
            if self._on_layer is not None:
                self._on_layer(result.layer, differences)
            if self._checkpoint is not None:
                reports = [asdict(block) for block in self.blocks[-count:]]
                walk = self._walk
                self._checkpoint.finish_layer(
                    result.layer, reports, differences, walk.streams, walk.batch_size, len(walk.tokens_NL)
                )
        self._layer.clear()

    def _tell(self, block: BlockReport, result: BlockResult | None) -> None:
        self.blocks.append(block)
        if self._on_block is not None:
            self._on_block(block, result)

    def _differences(self) -> dict[str, Difference]:
        return {
            linear.name: Difference.between(
                (linear.initial.mask_OI, linear.initial.weight_OI),
                (linear.final.mask_OI, linear.final.weight_OI),
                self._dtypes[linear.name],
            )
            for result in self._layer
            for linear in result.linears
        }


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode; modules that were training do so afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
