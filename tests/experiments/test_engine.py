"""The engine's benchmark runs, in memory and streamed, beside the plain walk with the same masks."""

import json
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import engine
from tests import tiny
from tests.cli.running import save_model


@pytest.mark.parametrize("more", [["--plain"], ["--streaming", "--activations=disk"]], ids=["plain", "streamed"])
def test_it_measures_a_walk(more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny.model("llama"), tmp_path / "model")
    command = [
        "engine.py",
        f"--model={tmp_path / 'model'}",
        "--samples=2",
        "--seqlen=16",
        "--alpha=0.5",
        "--device=cpu",
    ]
    monkeypatch.setattr(sys, "argv", [*command, f"--json={tmp_path / 'result.json'}", *more])
    engine.main()
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["exchanges"] > 0 and result["seconds"] and result["phases"]
    assert result["differing_bits"] == (0 if "--plain" in more else None)
