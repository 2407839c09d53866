"""Records as barber writes them, without a run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

LINEARS = ("self_attn.q_proj", "mlp.down_proj")
Write = Callable[..., Path]


def record(
    pruner: str | None = "Wanda",
    perplexity: float = 60.0,
    *,
    alpha: float | None = None,
    granularity: str = "output",
    sparsity: float = 0.5,
    nm: tuple[int, int] | None = None,
    seed: int = 0,
    model: str = "smollm2-135m",
    seqlen: int = 512,
    max_windows: int | None = 40,
    text: str = "wikitext2",
    calibration: tuple[int, int, str] = (16, 512, "wikitext2"),
    walk: float = 100.0,
    accuracy: float | None = None,
    limit: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What barber writes, as far as a report reads it."""
    found = {
        "perplexity": perplexity,
        "perplexity_standard_error": None,
        "nll_per_token": math.log(perplexity),
        "nll_standard_error": None,
        "windows": max_windows or 10_000 // seqlen * 20,
        "tokens": (max_windows or 10_000 // seqlen * 20) * (seqlen - 1),
        "text": "a file",
        "text_tokens": 10_000 // seqlen * 20 * seqlen,
        "seqlen": seqlen,
        "stride": seqlen,
        "bos": False,
        "max_windows": max_windows,
        "digest": f"{text}-{seqlen}-{max_windows}",
    }
    pruned: dict[str, Any] = {"perplexity": {text: found}}
    if accuracy is not None:
        whole = {"tasks": {}, "lm_eval": "0.4.13"}
        pruned["zero_shot"] = {**whole, "mean_of": ["boolq", "rte"], "mean_acc": accuracy, "limit": limit}
    dense = {"perplexity": {text: found | {"perplexity": 28.74}}}
    rebuild = None
    if alpha is not None:
        metric = {"_target_": "barber.metrics.WeightGradient"}
        rebuild = {
            "_target_": "barber.rebuild.Barber",
            "alpha": alpha,
            "granularity": granularity,
            "metric": metric,
        }
    samples, tokens, source = calibration
    pattern = {"_target_": "barber.patterns.Unstructured", "sparsity": sparsity}
    if nm:
        pattern = {"_target_": "barber.patterns.NM", "n": nm[0], "m": nm[1]}
    stage = "rebuilt" if rebuild else "pruned"
    content = {
        "config": {
            "name": "a_run",
            "seed": seed,
            "model": {"_target_": "barber.models.Packaged", "file": "x.gguf"},
            "pattern": pattern,
            "pruner": {"_target_": f"barber.pruners.{pruner}"} if pruner else None,
            "rebuild": rebuild,
            "calibration": {
                "_target_": "barber.calibration.hub",
                "nsamples": samples,
                "seqlen": tokens,
                "seed": seed,
            },
            "evals": {"seqlen": seqlen, "max_windows": max_windows, "bos": False},
        },
        "choices": {"model": model, "calibration": source},
        "overrides": ["pruner=wanda"],
        "status": "success",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": None,
        "versions": {"torch": "2.6"},
        "git": {"commit": "abc123", "dirty": False},
        "machine": {"device": "cpu"},
        "seeds": {"run": seed},
        "calibration": {"source": source, "samples": samples, "seqlen": tokens, "digest": "c4"},
        "sparsity": None,
        "linears": {
            f"model.layers.{layer}.{linear}": {"weights": 100, "zeros": 50, "exchanges": layer + 1 if alpha else 0}
            for layer in range(3)
            for linear in LINEARS
        },
        "results": {"dense": dense, stage: pruned} if pruner else {"dense": dense},
        "seconds": {"walk": walk},
        "walk_seconds": {"statistics": walk / 4, "exchange": walk * 3 / 4},
        "error": None,
    }
    return content | more
