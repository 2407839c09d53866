"""The package as users install it: a wheel, used from any folder, with its configs inside."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's contents and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves a build folder, and what lies in an old one gets into the wheel.
    source = folder / "source"
    for part in ("barber", "conf"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = folder.glob("llm_barber-*.whl")
    target = folder / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=300)
    return target


def barber(installed: Path, cwd: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "barber", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_wheel_runs_from_another_folder_with_its_own_configs(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A sentence about nothing in particular, said again and again. " * 40)
    assert "model: " in barber(installed, tmp_path, "--help")
    run = ["model=tiny", "calibration=text", "calibration.path=text.txt", "calibration.nsamples=4"]
    run += ["calibration.seqlen=32", "evals=none", "export=none", "hydra.run.dir=out"]
    barber(installed, tmp_path, *run)
    assert '"status": "success"' in (tmp_path / "out" / "record.json").read_text()
    where = "import barber, barber.conf; print(barber.__file__, barber.conf.__path__[0])"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.split() == [str(installed / "barber" / "__init__.py"), str(installed / "barber" / "conf")]


def test_every_config_of_the_repository_is_in_the_wheel(installed: Path) -> None:
    ours = {Path("conf") / path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    ours |= {path.relative_to(ROOT / "barber") for path in (ROOT / "barber").rglob("*.yaml")}
    theirs = {path.relative_to(installed / "barber") for path in installed.rglob("*.yaml")}
    assert ours == theirs
    assert ours
