"""What was measured of a model: the results of each kind, and all of one stage together.

Nothing here imports torch, so that records are read where it is not installed. In JSON a field is a key; what was not
measured has none.
"""

from dataclasses import dataclass, field

from barber.runtime.plain import FLAT


@dataclass(frozen=True)
class TextProtocol:
    """A text and the windows that it was cut into.

    Args:
        text: where it was found.
        text_tokens: tokens that it has.
        seqlen: tokens of a window.
        stride: tokens between the starts of two windows.
        bos: whether every window begins with the tokenizer's BOS token.
        max_windows: measured were the first so many windows at most; None: all.
        separator: what stands between the documents of a corpus; None: the text is none.
    """

    text: str
    text_tokens: int
    seqlen: int
    stride: int
    bos: bool
    max_windows: int | None
    separator: str | None = None


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity on a text.

    Args:
        perplexity: exp(`nll_per_token`); None: beyond 1e304.
        nll_per_token: mean cross-entropy of the scored tokens, in nats.
        perplexity_standard_error, nll_standard_error: over windows; None: there is one window.
        windows: how many were measured.
        tokens: how many were scored.
        digest: SHA-256 of the windows' token ids and of what of them is scored: equal where figures are comparable.
        cached: when another run measured it, ISO 8601 in UTC; None: this run did.
    """

    perplexity: float | None
    perplexity_standard_error: float | None
    nll_per_token: float
    nll_standard_error: float | None
    windows: int
    tokens: int
    protocol: TextProtocol = field(metadata=FLAT)
    digest: str
    cached: str | None = None


@dataclass(frozen=True)
class AgreementResult:
    """How far the model is from the dense one on a text.

    Args:
        kl_divergence: KL(dense || model) of the next-token distributions, mean over the scored tokens, in nats.
        top1_agreement: share of the scored tokens before which both find the same token the likeliest.
        kl_standard_error, top1_standard_error: over windows; None: there is one window.
        block_errors: by layer and block (`0.attention`), the squared distance of the block's output from the dense
            model's as a share of the latter's square; None: the dense block gives zeros.
        block_positions: at how many positions, spread evenly over all windows, the blocks were compared.
        windows, tokens, digest, cached: as those of `PerplexityResult`.
    """

    kl_divergence: float
    kl_standard_error: float | None
    top1_agreement: float
    top1_standard_error: float | None
    block_errors: dict[str, float | None]
    block_positions: int
    windows: int
    tokens: int
    protocol: TextProtocol = field(metadata=FLAT)
    digest: str
    cached: str | None = None


@dataclass(frozen=True)
class TaskResult:
    """A task or group of lm-eval's.

    Args:
        metrics: lm-eval's by their names, `acc`, and their standard errors over documents, `acc_stderr`. Accuracies are
            shares of 1.
        version: lm-eval's, of the task's prompts and metrics.
        num_fewshot: examples before every question.
        documents: how many were asked, of `documents_in_all`; None: the tasks of a group have them.
        digest: SHA-256 of the documents and of how they are asked; None: as for `documents`.
        data: where the documents come from.
    """

    metrics: dict[str, float] = field(metadata=FLAT)
    version: float | str | None
    num_fewshot: int | None
    documents: int | None = None
    documents_in_all: int | None = None
    digest: str | None = None
    data: str | None = None

    @property
    def acc(self) -> float | None:
        """The accuracy, where the task has one."""
        return self.metrics.get("acc")


@dataclass(frozen=True)
class ZeroShotResult:
    """Tasks by EleutherAI's lm-eval harness.

    Args:
        tasks: by name; of a group also the tasks in it.
        mean_acc: mean accuracy of what was asked for, `mean_of`; None: something of it has no accuracy.
        limit: only the first so many documents of every task were asked; None: all.
        lm_eval: the harness's version.
        prompts: that went through the model, one an answer; None: kept before they were counted.
        prompts_cut: how many of them were longer than the model and lost their beginning.
        cached: as that of `PerplexityResult`.
    """

    tasks: dict[str, TaskResult]
    mean_acc: float | None
    mean_of: tuple[str, ...] | None
    limit: int | None
    lm_eval: str
    prompts: int | None = None
    prompts_cut: int | None = None
    cached: str | None = None


@dataclass(frozen=True)
class SampleResult:
    """How the model goes on with a prompt, by `tokens` tokens."""

    prompt: str
    text: str
    tokens: int


@dataclass(frozen=True)
class TextResults:
    """What was measured on one text."""

    perplexity: PerplexityResult | None = None
    agreement: AgreementResult | None = None


@dataclass(frozen=True)
class StageResults:
    """What was measured of a stage of the model: dense, with the initial mask (pruned), with the rebuilt one.

    Args:
        perplexity, agreement: by text.
    """

    perplexity: dict[str, PerplexityResult] = field(default_factory=dict)
    agreement: dict[str, AgreementResult] = field(default_factory=dict)
    zero_shot: ZeroShotResult | None = None
    sample: SampleResult | None = None
