"""What the campaigns share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests import tiny
from tests.faults.injecting import attempt, calls_of

#: Kinds of runs, by what they write; `RUN` and `SWEEP` say where.
RUN, SWEEP = ["hydra.run.dir=run"], ["hydra.mode=MULTIRUN", "hydra.sweep.dir=run"]
MEASURED = ["evals/text=tokens", "evals.texts.tokens.path=tokens", "evals.seqlen=16", "evals.max_windows=2"]
KINDS = {
    "model": ["evals=none", "cache=off", *RUN],
    "masks": ["evals=none", "cache=off", "export=masks", "rebuild=none", *RUN],
    "streamed": ["evals=none", "cache=off", "engine.streaming=true", "engine.activations=disk", *RUN],
    "measured and cached": [*MEASURED, "evals.sample=null", "export=none", *RUN],
    "sweep": ["evals=none", "cache=off", "rebuild=none,barber", "export=hf", *SWEEP],
    "allocation": ["evals=none", "cache=off", "allocation=owl", "pruner=sparsegpt", "update=least_squares", *RUN],
}


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"tokens": tiny.tokens(4, 16)}, path)
    return path


@pytest.fixture
def command(tokens: Path) -> Callable[[str], list[str]]:
    """The command of a kind."""

    def of_kind(kind: str) -> list[str]:
        begin = ["model=tiny", "pruner=wanda", "calibration=tokens", f"calibration.path={tokens}"]
        return [*begin, *(one.replace("path=tokens", f"path={tokens}") for one in KINDS[kind])]

    return of_kind


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("BARBER_CACHE", str(folder))
    return folder


@pytest.fixture
def whole(command: Callable[[str], list[str]], tmp_path: Path, cache: Path) -> Callable[[str], tuple[Path, int]]:
    """The run folder of a command of a kind without a fault, and how many calls it has that write."""

    def of_kind(kind: str) -> tuple[Path, int]:
        outcome = attempt(command(kind), None, tmp_path / "whole", cache)
        assert outcome.result is not None and (outcome.result.code, outcome.result.err) == (0, ""), outcome
        shutil.rmtree(cache)
        cache.mkdir()
        return tmp_path / "whole" / "run", len(calls_of(tmp_path / "whole"))

    return of_kind
