import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.making import Write, record


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run's folder, each a minute after the one before."""
    count = iter(range(1000))

    def write(name: str | None = None, *arguments: Any, folder: str = "", **settings: Any) -> Path:
        number = next(count)
        place = tmp_path / folder / (name or f"run{number:02}")
        place.mkdir(parents=True)
        content = record(*arguments, **settings)
        content.setdefault("digest", f"digest{number}")
        content["started"] = f"2026-01-01T{number // 60:02}:{number % 60:02}:00+00:00"
        (place / "record.json").write_text(json.dumps(content))
        (place / "run.log").write_text("first\nthe end of the log </pre><script>boom()</script>\n")
        if content["config"]["rebuild"]:
            blocks = [
                {"layer": layer, "block": block, "loss_before": 2.0, "loss_after": 1.0}
                for layer in range(3)
                for block in ("attention", "mlp")
            ]
            (place / "layers.jsonl").write_text("\n".join(map(json.dumps, blocks)) + '\n{"layer": 3, "blo')
        return place

    return write
