"""Everything in conf/ that a walk does, killed at a layer and gone on with: the same masks, weights and record.

In memory and streamed, without a cache, and with one that is kept, has gone, or was filled by another run meanwhile.
"""

import shutil
from pathlib import Path
from zlib import crc32

import pytest
from safetensors.torch import save_file

from tests import tiny
from tests.cli.running import done
from tests.cli.test_resume import assert_the_same, finished_in, killed

CONF = Path(__file__).parents[2] / "conf"
LAYERS = 3
# Smaller searches, larger steps.
SMALLER = {
    "allocation=evopress": "allocation.generations=3 allocation.offspring=4 allocation.survivors=[2,1] "
    "allocation.tokens=[64,128]",
    "update=reconstruct": "update.reconstruct.learning_rate=0.01",
    "rebuild=barber": "rebuild.barber.alpha=0.9",
}
# The paper's steps are Barber with other numbers.
OTHERS = ("none", "uniform", "paper_magnitude", "paper_sparsegpt", "paper_wanda")
GROUPS = ("pruner", "rebuild", "update", "allocation")
CHOICES = [
    f"{group}={path.stem}"
    for group in GROUPS
    for path in sorted((CONF / group).glob("*.yaml"))
    if path.stem not in OTHERS
]
CHOICES += [
    "schedule=interleaved",
    "schedule=interleaved pruner=gblm",
    "pruner=sparsegpt update=least_squares rebuild=none",
    "rebuild=[barber,swaps] rebuild.swaps.follow=0.5",
    "pattern=2of4",
    "precision.forward=bfloat16 precision.gradient=bfloat16",
    "engine.activations=disk",
]
both = pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "tokens.safetensors"
    save_file({"tokens": tiny.tokens(6, 32, seed=5)}, path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BARBER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def command(choice: str, streamed: bool, tokens: Path, *more: str) -> list[str]:
    """All but the run folder."""
    changes = {one.partition("=")[0]: one for one in ["pruner=wanda", "rebuild=barber", *choice.split()]}
    small = " ".join(SMALLER.get(one, "") for one in changes.values()).split()
    model = ["model=tiny", f"model.settings.num_hidden_layers={LAYERS}", f"engine.streaming={streamed}"]
    data = ["calibration=tokens", f"calibration.path={tokens}", "evals=none"]
    return [*model, *data, *changes.values(), *small, *more]


def kill(arguments: list[str], folder: Path) -> None:
    """Kill a run at a layer that depends on its arguments."""
    layer = 1 + crc32(" ".join(arguments[4:]).encode()) % (LAYERS - 1)
    killed([*arguments, f"hydra.run.dir={folder}"], f"layer-{layer:05d}.json", folder.parent / "said")
    assert finished_in(folder) == layer


@both
@pytest.mark.parametrize("choice", CHOICES)
def test_without_a_cache(choice: str, streamed: bool, tokens: Path, tmp_path: Path) -> None:
    arguments = command(choice, streamed, tokens, "cache=off")
    done(*arguments, f"hydra.run.dir={tmp_path / 'whole'}")
    kill(arguments, tmp_path / "run")
    assert "Going on with" in done(*arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert_the_same(tmp_path / "run", tmp_path / "whole")


PRUNERS = [choice for choice in CHOICES if choice.startswith("pruner=") and " " not in choice]
FOLLOWING = "rebuild=[barber,swaps] rebuild.swaps.follow=0.5"


@both
@pytest.mark.parametrize("when", ["kept", "gone", "filled meanwhile"])
@pytest.mark.parametrize("choice", [*PRUNERS, FOLLOWING])
def test_with_a_cache(choice: str, when: str, streamed: bool, tokens: Path, cache: Path, tmp_path: Path) -> None:
    arguments = command(choice, streamed, tokens)
    whole = [*arguments, f"hydra.run.dir={tmp_path / 'whole'}"]
    if when != "filled meanwhile":
        done(*whole)
    kill(arguments, tmp_path / "run")
    if when == "gone":
        shutil.rmtree(cache, ignore_errors=True)  # cheap initial masks are not kept
    elif when != "kept":
        done(*whole)
    done(*arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert_the_same(tmp_path / "run", tmp_path / "whole")


def test_nothing_is_left_out() -> None:
    """A group of conf/ whose components take part in a walk has its place here."""
    assert {path.name for path in CONF.iterdir() if list(path.rglob("*.yaml"))} - {*GROUPS, "pattern"} == {
        *("cache", "calibration", "evals", "experiment", "export", "hydra", "method", "metric", "model", "tracker")
    }
