"""The same sweep through every launcher gives the same records."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests import tiny
from tests.cli.running import done

LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
}


def told(arguments: list[str], of_its_own: bool) -> str:
    """What a command says that has to go well, in a process of its own or in this one."""
    if not of_its_own:
        return done(*arguments)
    command = [sys.executable, "-m", "barber", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result
    return result.stdout


def figures_of(launcher: str, folder: Path) -> dict[str, Any]:
    """What the records of a small sweep hold but for times and places, by the digest of the config."""
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    save_file({"tokens": tiny.tokens(5, 64)}, folder / "tokens.safetensors")
    arguments = [
        *(
            "-m",
            "model=tiny",
            "method=wanda,wanda_barber",
            "threads=1",
        ),
        *("calibration=tokens", f"calibration.path={folder / 'tokens.safetensors'}", "export=none"),
        *("evals/text=tokens", f"evals.texts.tokens.path={folder / 'tokens.safetensors'}", "evals.sample=null"),
        # named by what is chosen, which differs between the jobs
        *("evals.seqlen=64", f"hydra.sweep.dir={folder / launcher}/${{sweep:}}", *LAUNCHERS[launcher]),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BARBER_CACHE", str(folder / f"cache-{launcher}"))
        assert "2 done, 0 skipped, 0 failed" in told(arguments, of_its_own=launcher != "basic")
    found = {}
    for path in (folder / launcher / "tiny_unstructured_method").glob("*/record.json"):
        record = json.loads(path.read_text())
        perplexity = {
            stage: results["perplexity"]["tokens"]["nll_per_token"] for stage, results in record["results"].items()
        }
        found[record["digest"], path.parent.name] = (perplexity, record["linears"], record["calibration"]["digest"])
    assert len(found) == 2
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def one_after_the_other(folder: Path) -> dict[str, Any]:
    return figures_of("basic", folder)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_records_are_those_of_one_job_after_the_other(
    launcher: str, folder: Path, one_after_the_other: dict[str, Any]
) -> None:
    assert figures_of(launcher, folder) == one_after_the_other
