"""Two runs side by side."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import barber
from barber import UserError
from barber.evals.results import StageResults
from tests import records


def run(folder: Path, config: dict[str, Any], perplexity: float, masks: dict[str, np.ndarray] | None = None) -> Path:
    folder.mkdir()
    results = {"rebuilt": StageResults({"text": records.perplexity(perplexity)})}
    seconds = {"compare": 3.0, "exchange": 1.0}
    records.record(config=config, results=results, walk_seconds=seconds).write(folder)
    if masks is not None:
        save_file({key: np.packbits(bits) for key, bits in masks.items()}, folder / "masks.safetensors")
    return folder


MASK = np.zeros(16, dtype=bool)
CHANGED = MASK.copy()
CHANGED[[3, 7, 8]] = True


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    first = {"initial.q": MASK, "final.q": MASK, "final.k": MASK}
    second = {"initial.q": MASK, "final.q": CHANGED, "final.k": MASK}
    return (
        run(tmp_path / "a", {"seed": 0, "rebuild": {"barber": {"alpha": 0.1}}, "pruner": {"x": 1}}, 20.0, first),
        run(tmp_path / "b", {"seed": 0, "rebuild": {"barber": {"alpha": 0.5}}, "pruner": None}, 25.0, second),
    )


def test_settings_masks_and_results_that_differ(folders: tuple[Path, Path]) -> None:
    found = barber.compare(*folders)
    assert found.settings == {"pruner.x": (1, None), "rebuild.barber.alpha": (0.1, 0.5)}
    assert list(found.masks) == ["initial", "final"]
    assert found.masks["final"]["q"].differing == 3 and found.masks["final"]["q"].bits == 16
    assert found.masks["final"]["k"].differing == found.total("initial").differing == 0
    assert found.total("final").share == 3 / 32
    assert found.results == {"rebuilt.perplexity.text.perplexity": (20.0, 25.0)}
    assert found.seconds == (4.0, 4.0)


def test_the_command_prints_it(folders: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "experiments.diff", *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in (
        "  rebuild.barber.alpha: 0.1 | 0.5",
        "final masks: 3 of 32 bits differ (9.3750%)",
        "  most in q: 3 of 16 (18.7500%)",
        "  rebuilt.perplexity.text.perplexity: 20.0000 | 25.0000 (+25.00%)",
    ):
        assert line in result.stdout.splitlines()


def test_a_run_is_equal_to_itself(folders: tuple[Path, Path]) -> None:
    found = barber.compare(folders[0], folders[0])
    assert found.settings == {} and found.total("final").differing == 0
    assert "none" in str(found)


def test_runs_without_masks_are_compared_all_the_same(folders: tuple[Path, Path]) -> None:
    (folders[0] / "masks.safetensors").unlink()
    assert barber.compare(*folders).masks == {}


def test_what_is_no_run_is_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere must be the folder of a run, with a record\.json"):
        barber.compare(folders[0], tmp_path / "nowhere")
    (tmp_path / "record.json").write_text("[]")
    with pytest.raises(UserError, match=r"record\.json must be the record of a run, and is damaged or none"):
        barber.compare(folders[0], tmp_path)
    (folders[1] / "masks.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="must be masks that export=masks has written"):
        barber.compare(*folders)


def test_masks_of_another_model_are_refused(folders: tuple[Path, Path]) -> None:
    save_file({"initial.q": np.packbits(MASK[:8])}, folders[1] / "masks.safetensors")
    with pytest.raises(UserError, match="must be masks of the same model"):
        barber.compare(*folders)
