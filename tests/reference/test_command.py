"""The vectors' cases through the command line: the files a user gets hold the masks that `test_vectors` checks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.running import barber, record_of, save_model
from tests.reference.test_vectors import CASES, ids, load_dense, prune_as, unpack

METRICS = {"WD": "weight_gradient", "W": "weight", "D": "gradient"}
PATTERNS = {"2:4": "2of4", "4:8": "4of8"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both families' models as Hugging Face folders, and their calibration tokens."""
    folder = tmp_path_factory.mktemp("vectors")
    for family in ("llama", "opt"):
        model, tokens_BL = load_dense(family)
        save_model(model, folder / family)
        save_file({"tokens": tokens_BL}, folder / f"{family}.tokens.safetensors")
    return folder


def overrides(case: dict[str, Any], inputs: Path, out: Path) -> list[str]:
    family, pattern = case["family"], case["pattern"]
    return [
        "model=local",
        f"model.path={inputs / family}",
        "calibration=tokens",
        f"calibration.path={inputs / family}.tokens.safetensors",
        *([f"pattern={PATTERNS[pattern]}"] if pattern in PATTERNS else [f"pattern.sparsity={case['ratio']}"]),
        f"pruner={case['method']}",
        f"metric={METRICS[case['metric']]}",
        f"rebuild.barber.alpha={case['alpha']}",
        f"rebuild.barber.granularity={case['gran'].removesuffix('1')}",
        f"rebuild.barber.retain_reconstruction={str(case['retain']).lower()}",
        "batch_size=8",
        "evals=none",
        "export=masks",
        f"hydra.run.dir={out}",
    ]


def chosen() -> list[dict[str, Any]]:
    """As many cases as show every value of every setting: `test_vectors` has them all, without the command."""
    shown: set[tuple[str, str]] = set()
    cases = []
    for case in CASES:
        settings = {
            (key, str(case[key])) for key in ("family", "pattern", "method", "metric", "gran", "alpha", "retain")
        }
        if not settings <= shown:
            shown |= settings
            cases.append(case)
    return cases


@pytest.mark.parametrize("case", chosen(), ids=ids)
def test_the_command_writes_the_masks_of_the_case(case: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    result = barber(*overrides(case, inputs, tmp_path / "out"))
    assert result.code == 0, result.err
    written = load_file(tmp_path / "out" / "masks.safetensors")
    _, expected, _ = prune_as(case)
    for name, linear in expected.items():
        for stage, pruned in (("initial", linear.initial), ("final", linear.final)):
            assert torch.equal(unpack(written[f"{stage}.{name}"], pruned.mask_OI.shape), pruned.mask_OI), name
    record = record_of(tmp_path / "out")
    assert set(record["linears"]) == set(expected)
    assert record["status"] == "success"
