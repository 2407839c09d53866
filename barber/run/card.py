"""The README.md of a pruned model."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from barber.evals.results import AgreementResult, PerplexityResult, StageResults
from barber.methods.patterns import NM
from barber.run.experiment import Experiment
from barber.run.origin import origin_of
from barber.run.record import RunRecord, Sparsity
from barber.run.tracking import figures

_MEASURES = {
    "kl_divergence": "KL divergence from the dense model",
    "top1_agreement": "same top token as the dense model",
}


def model_card(experiment: Experiment, record: RunRecord, has_tokenizer: bool = True) -> str:
    """What the model is and how it was made, what was measured of it, how it is loaded, and the exact config."""
    assert record.sparsity is not None
    parts = [
        f"---\n{_yaml(_front_matter(experiment, record.sparsity))}\n---",
        f"# {experiment.name}",
        *_what_it_is(experiment, record, record.sparsity),
        f"## Use\n\n```python\n{_use(has_tokenizer)}\n```",
        *_results(record.results),
        f"## Config\n\n```yaml\n{_yaml(record.config)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(experiment: Experiment, sparsity: Sparsity) -> dict[str, Any]:
    """What the hub reads; of the relations that a `base_model` may have there, none is pruning."""
    share = sparsity.sparsity if sparsity.overall is None else sparsity.overall
    tags = ["pruned", "sparse", f"sparsity-{100 * share:.3g}", "pruning", "llm-barber"]
    if isinstance(pattern := experiment.pattern, NM):
        tags.insert(3, f"{pattern.n}of{pattern.m}")
    origin = origin_of(experiment.model)
    return origin | {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}


def _what_it_is(experiment: Experiment, record: RunRecord, sparsity: Sparsity) -> Iterator[str]:
    dense = record.zeros.get("dense")
    before = f" The dense model had {dense.zeros:,} zeros there ({dense.share:.2%})." if dense and dense.zeros else ""
    which, overall = "in the linears of its decoder layers", ""
    if sparsity.overall is not None:
        which = "in those linears of its decoder layers that were pruned"
        overall = f" Others were left out and are dense; of all together it is {sparsity.overall:.2%}."
    yield (
        f"{experiment.model}, pruned to {experiment.pattern} sparsity:\n"
        f"{sparsity.zeros:,} of the {sparsity.weights:,} weights {which} are exactly zero\n"
        f"({sparsity.sparsity:.2%}).{overall}{before} Embeddings, norms, biases and the language-model head are dense."
    )
    yield (
        "Pruned in one shot, without retraining, with [LLM-Barber](https://arxiv.org/abs/2408.10631). The zeros are\n"
        "stored like other weights: the folder is as large and the model as fast as the dense one unless a sparse\n"
        "kernel is used."
    )
    if drawn := record.calibration:
        yield f"Calibrated on {drawn}.\nSHA-256 of their token ids: `{drawn.digest}`."
    if update := ", ".join(type(step).__name__ for step in (experiment.update or {}).values()):
        yield f"With reconstruction: the kept weights have new values, by {update}."


def _use(has_tokenizer: bool) -> str:
    imported = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    lines = [
        f"from transformers import {imported}\n",
        'folder = "."  # this one, or the name of the repository that it has become',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    ]
    if has_tokenizer:
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            'prompt = tokenizer("The capital of France is", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))",
        ]
    return "\n".join(lines)


def _results(results: Mapping[str, StageResults]) -> Iterator[str]:
    """A table with a column a stage, and how its figures were measured."""
    rows: dict[str, dict[str, str]] = {}
    for stage, measure, of, value, error in figures(results):
        if measure != "nll_per_token":
            rows.setdefault(f"{_MEASURES.get(measure, measure)}, {of}", {})[stage] = _figure(measure, value, error)
    if not rows:
        return
    lines = [["", *results], ["---", *["---:"] * len(results)]]
    lines += [[row, *(cells.get(stage, "-") for stage in results)] for row, cells in rows.items()]
    yield "## Results"
    yield "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)
    yield "± is the standard error, of a text over its windows, of a task over its documents."
    yield "\n".join(f"- {line}" for line in _protocols(results))


def _figure(measure: str, value: float, error: float | None) -> str:
    digits = {"perplexity": ",.2f", "kl_divergence": ".4f"}.get(measure, ".2%")
    return f"{value:{digits}}" + ("" if error is None else f" ± {error:{digits}}")


def _protocols(results: Mapping[str, StageResults]) -> Iterator[str]:
    texts: dict[str, PerplexityResult | AgreementResult] = {}
    tasks: dict[str, str] = {}
    for one in results.values():
        texts.update(one.perplexity)
        texts.update(one.agreement)
        if found := one.zero_shot:
            asked = "all documents" if found.limit is None else f"the first {found.limit} documents"
            tasks[", ".join(found.tasks)] = f"{asked} of every task, lm-eval {found.lm_eval}"
    for name, result in texts.items():
        yield f"{name}: {_windows(result)} of {result.protocol.text}; SHA-256 of the token ids `{result.digest}`"
    for names, how in tasks.items():
        yield f"{names}: {how}"


def _windows(result: PerplexityResult | AgreementResult) -> str:
    protocol = result.protocol
    which = "all" if protocol.max_windows is None else "the first"
    stride = "" if protocol.stride == protocol.seqlen else f", {protocol.stride} apart,"
    bos = ", each beginning with BOS," if protocol.bos else ""
    return f"{which} {result.windows:,} windows of {protocol.seqlen} tokens{stride}{bos}"


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True).rstrip()
