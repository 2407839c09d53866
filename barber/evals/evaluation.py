"""Everything that is measured of a model, at every stage of a run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from barber.data.texts import Text
from barber.errors import UserError, require_counts, within
from barber.evals.agreement import Agreement, Divergence, Reference
from barber.evals.cache import ResultCache, keep, kept_results, kept_tensors
from barber.evals.forward import Forward
from barber.evals.perplexity import Perplexity
from barber.evals.placement import Placement, goes_by_layer, placed
from barber.evals.results import StageResults, TextResults, ZeroShotResult
from barber.evals.sample import Sample
from barber.evals.tasks import Tasks
from barber.evals.watch import Watch
from barber.evals.windows import WindowProtocol, Windows
from barber.evals.zero_shot import ZeroShot
from barber.model.decoder import Decoder
from barber.model.weights import Stage, Weights
from barber.runtime.activations import Place
from barber.runtime.cache import Cache
from barber.runtime.products import fast_linears

log = logging.getLogger("barber")

_TOKENS_OF_A_BATCH = 2048


@dataclass(frozen=True)
class Evaluation:
    """What is measured.

    Args:
        stages: of which models: dense, with the initial mask (pruned), with the rebuilt one.
        texts: the texts that perplexity and agreement are measured on, by name.
        windows: how a text becomes windows, a protocol a length. Results of the first have the text's name, those of
            others also their length (`wikitext2_2048`).
        perplexity: whether to measure perplexity.
        agreement: how to compare with the dense model, or None.
        zero_shot: lm-eval tasks, or None.
        sample: a prompt to go on with, or None.
        batch_size: windows that go through the model together; None: as many as have 2048 tokens.
        placement: `whole`: the model as a whole on the device; `layers`: one decoder layer at a time; `auto`: whole
            where its weights fit.
    """

    stages: Sequence[Stage]
    texts: Mapping[str, Text]
    windows: Sequence[WindowProtocol]
    perplexity: bool = True
    agreement: Agreement | None = None
    zero_shot: ZeroShot | None = None
    sample: Sample | None = None
    batch_size: int | None = None
    placement: Placement = "auto"

    def __post_init__(self) -> None:
        require_counts(self, "batch_size")
        if self.reads_texts and not self.texts:
            raise UserError("must name a text at least, as evals/text=wikitext2 or evals/text=[wikitext2,ptb]", "texts")
        lengths = [protocol.seqlen for protocol in self.windows]
        if not lengths or len(set(lengths)) < len(lengths):
            raise UserError(f"must be a length or several different ones, not {lengths}", field="seqlen")

    @property
    def reads_texts(self) -> bool:
        """Whether anything is measured on texts."""
        return self.perplexity or self.agreement is not None

    def windows_of(self, text: str) -> dict[str, WindowProtocol]:
        """The protocols by the names of their results on a text."""
        return {f"{text}_{one.seqlen}" if number else text: one for number, one in enumerate(self.windows)}

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None, out: Path, cache: Cache | None = None) -> "Prepared":
        """Read the texts and the tasks' data; configs of tasks with local data are written to `out`.

        Args:
            cache: keeps token ids and results for later runs; None: nothing is kept.

        Raises:
            UserError: something that is measured on is not to be had.
        """
        windows = {}
        for name, text in self.texts.items() if self.reads_texts else ():
            with within(f"texts.{name}"):
                tokens = text.tokens(tokenizer, cache)
            for key, protocol in self.windows_of(name).items():
                windows[key] = protocol.cut(text, tokens, tokenizer)
        tasks = None
        if self.zero_shot is not None:
            if tokenizer is None:
                raise UserError("needs a tokenizer and the model has none", field="zero_shot")
            if not tokenizer.encode("a question"):
                raise UserError(
                    "needs a tokenizer that knows words; that of the model makes nothing of a text", "zero_shot"
                )
            with within("zero_shot"):
                tasks = self.zero_shot.prepare(out)
        return Prepared(self, tokenizer, windows, tasks, cache)


@dataclass
class Prepared:
    """An evaluation whose data are read; it measures the stages of one run."""

    spec: Evaluation
    tokenizer: PreTrainedTokenizerBase | None
    windows: dict[str, Windows]
    tasks: Tasks | None
    cache: Cache | None = None
    dense: ResultCache | None = None
    references: dict[str, Reference] = field(default_factory=dict)

    def reports(self, stage: str) -> bool:
        """Whether a stage of the model is to be measured."""
        return stage in self.spec.stages

    def measure(
        self,
        stage: Stage,
        model: PreTrainedModel,
        device: torch.device,
        watch: Watch,
        weights: Weights | None = None,
        activations: Place = "auto",
        scratch: Path | None = None,
    ) -> StageResults | None:
        """Measure a stage of the model; None: there is nothing to measure.

        Layers' weights come from `weights` (None: the model's own); layer by layer, the windows wait in `activations`.

        The dense model is looked at also where only others are compared with it.
        """
        compares = stage == "dense" and self.spec.agreement is not None
        if not (self.reports(stage) or compares):
            return None
        by_layer = goes_by_layer(self.spec.placement, model, device, weights)
        cache = self._results_of(stage, model, device, weights)
        with placed(model, device, by_layer, weights), torch.no_grad(), fast_linears(list(model.modules()), device):
            forward = partial(Forward, model, device, by_layer=by_layer, weights=weights)
            forward = partial(forward, activations=activations, scratch=scratch)
            measurement = _Measurement(self, stage, model, forward, by_layer, cache, watch)
            texts = {name: measurement.on_text(name) for name in self.windows}
            if not self.reports(stage):
                return None
            spec, tokenizer = self.spec, self.tokenizer
            results = StageResults(
                perplexity={name: one.perplexity for name, one in texts.items() if one.perplexity is not None},
                agreement={name: one.agreement for name, one in texts.items() if one.agreement is not None},
                zero_shot=None if self.tasks is None else measurement.zero_shot(self.tasks),
                sample=spec.sample.evaluate(model, tokenizer) if spec.sample and tokenizer is not None else None,
            )
        return results if results != StageResults() else None

    def _results_of(
        self, stage: Stage, model: PreTrainedModel, device: torch.device, weights: Weights | None
    ) -> ResultCache | None:
        """The cache for the model as it is now; the rebuilt one is what a run is about, and always measured."""
        if self.cache is None or stage == "rebuilt":
            return None
        cache = ResultCache(self.cache, model, device, weights)
        if stage == "dense":
            self.dense = cache
        _ = cache.facts  # of the weights that are there now
        return cache


@dataclass(frozen=True)
class _Measurement:
    """One stage of a model, placed on the device."""

    prepared: Prepared
    stage: Stage
    model: PreTrainedModel
    forward: Callable[..., Forward]
    by_layer: bool
    cache: ResultCache | None
    watch: Watch

    def on_text(self, name: str) -> TextResults:
        """Perplexity and agreement on a text, in one pass over its windows."""
        spec, windows = self.prepared.spec, self.prepared.windows[name]
        batch_size = spec.batch_size or max(1, _TOKENS_OF_A_BATCH // windows.tokens_NL.shape[1])
        if self.cache is None:
            return self._run(name, batch_size)
        positions = spec.agreement.block_positions if spec.agreement else None
        dense = self.prepared.dense
        entry = self.cache.entry(
            windows=windows.digest,
            perplexity=spec.perplexity,
            agreement=positions,
            compared_with=dense.facts["model"] if dense and self.stage != "dense" and spec.agreement else None,
            batch_size=batch_size,
            by_layer=self.by_layer,
        )
        has_reference = spec.agreement is not None and self.stage == "dense"

        def read() -> TextResults | None:
            known, tensors = kept_results(entry, TextResults), kept_tensors(entry) if has_reference else None
            if known is None or (has_reference and tensors is None):
                return None
            if tensors is not None:
                self.prepared.references[name] = Reference.of(tensors)
            found, measured = known
            # where the text was found this time may differ; the token ids do not
            own: dict[str, Any] = {"protocol": windows.protocol, "cached": measured}
            return TextResults(
                perplexity=None if found.perplexity is None else replace(found.perplexity, **own),
                agreement=None if found.agreement is None else replace(found.agreement, **own),
            )

        def make() -> TextResults:
            results = self._run(name, batch_size)
            keep(entry, results, self.prepared.references[name].tensors() if has_reference else None)
            return results

        return entry.read_or_make(f"the {self.stage} model's results on {name}", read, make)

    def _run(self, name: str, batch_size: int) -> TextResults:
        spec, windows = self.prepared.spec, self.prepared.windows[name]
        outputs = spec.agreement.outputs(windows) if spec.agreement else None
        perplexity = Perplexity(windows) if spec.perplexity else None
        num_windows = len(windows.tokens_NL)
        reference = Reference(num_windows) if spec.agreement and self.stage == "dense" else None
        divergence = None
        if spec.agreement and self.stage != "dense":
            divergence = Divergence(windows, Decoder(self.model), self.prepared.references[name])
        forward = self.forward(batch_size=batch_size)
        progress = self.watch(f"{self.stage} on {name}", forward.steps(num_windows))
        for batch in forward(windows.tokens_NL, outputs, progress):
            for meter in (perplexity, reference, divergence):
                if meter is not None:
                    meter.add(batch)
        if reference is not None and outputs is not None:
            reference.blocks = outputs.joined()
            self.prepared.references[name] = reference
        return TextResults(
            perplexity=None if perplexity is None else perplexity.result(),
            agreement=None if divergence is None or outputs is None else divergence.result(outputs.joined()),
        )

    def zero_shot(self, tasks: Tasks) -> ZeroShotResult:
        """The harness's tasks."""
        spec, tokenizer = self.prepared.spec.zero_shot, self.prepared.tokenizer
        assert spec is not None and tokenizer is not None
        if self.cache is None:
            return spec.evaluate(self.model, tokenizer, tasks, self.watch)
        entry = self.cache.entry(zero_shot=spec.facts(tasks, tokenizer))

        def read() -> ZeroShotResult | None:
            known = kept_results(entry, ZeroShotResult)
            return None if known is None else replace(known[0], cached=known[1])

        def make() -> ZeroShotResult:
            results = spec.evaluate(self.model, tokenizer, tasks, self.watch)
            keep(entry, results)
            return results

        return entry.read_or_make(f"the {self.stage} model's accuracies", read, make)


def evaluation(
    stages: Sequence[Stage] = ("dense", "pruned", "rebuilt"),
    texts: Mapping[str, Text] | None = None,
    seqlen: int | Sequence[int] = 2048,
    stride: int | None = None,
    bos: bool = False,
    max_windows: int | None = None,
    perplexity: bool = False,
    agreement: Agreement | None = None,
    zero_shot: ZeroShot | None = None,
    sample: Sample | None = None,
    batch_size: int | None = None,
    placement: Placement = "auto",
) -> Evaluation:
    """An evaluation from one flat set of options; those of the windows are `WindowProtocol`'s.

    Args:
        seqlen: of one length or, for results of each, several.
    """
    lengths = [seqlen] if isinstance(seqlen, int) else seqlen
    return Evaluation(
        stages=stages,
        texts=texts or {},
        windows=[WindowProtocol(length, stride, bos, max_windows) for length in lengths],
        perplexity=perplexity,
        agreement=agreement,
        zero_shot=zero_shot,
        sample=sample,
        batch_size=batch_size,
        placement=placement,
    )
