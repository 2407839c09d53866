"""The README.md of a pruned model."""

import yaml

from barber.run.experiment import Experiment
from barber.run.record import RunRecord


def model_card(experiment: Experiment, record: RunRecord) -> str:
    """What the model is, how it was made, and the exact config."""
    sparsity = record.sparsity
    assert sparsity is not None
    dense = record.zeros.get("dense")
    before = f" The dense model had {dense.zeros:,} zeros there ({dense.share:.2%})." if dense and dense.zeros else ""
    calibrated = f"\nCalibrated on {record.calibration}.\n" if record.calibration else ""
    update = ", ".join(type(step).__name__ for step in (experiment.update or {}).values())
    updated = f"\nWith reconstruction: the kept weights have new values, by {update}.\n" if update else ""
    which, overall = "in the linears of its decoder layers", ""
    if sparsity.overall is not None:
        which = "in those linears of its decoder layers that were pruned"
        overall = f" Others were left out and are dense; of all together it is {sparsity.overall:.2%}."
    config_yaml = yaml.safe_dump(record.config, sort_keys=False)
    return f"""---
library_name: transformers
tags:
- pruning
- sparsity
- llm-barber
---

# {experiment.name}

{experiment.model}, pruned to {experiment.pattern} sparsity:
{sparsity.zeros:,} of the {sparsity.weights:,} weights {which} are exactly zero
({sparsity.sparsity:.2%}).{overall}{before} Embeddings, norms, biases and the language-model head are dense.

Pruned in one shot, without retraining, with [LLM-Barber](https://arxiv.org/abs/2408.10631). The zeros are stored like
other weights: the folder is as large and the model as fast as the dense one unless a sparse kernel is used.
{calibrated}{updated}
## Config

```yaml
{config_yaml.rstrip()}
```
"""
