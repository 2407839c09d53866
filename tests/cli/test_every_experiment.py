"""Every experiment of conf/ from its name to its last figure: on a tiny model, with texts in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from barber.report.__main__ import main as report
from tests.cli.running import barber

CONF = Path(__file__).parents[2] / "conf"
# The others need data of zero-shot tasks, or have a test with Optuna.
OTHERS = {"table_zero_shot", "wanda_smollm2", "search_alpha_granularity"}
NAMES = sorted({path.stem for path in (CONF / "experiment").glob("*.yaml")} - OTHERS)
#: What a test model has no room for.
SMALLER = {"ablation_calibration_size": ["calibration.nsamples=2,4"], "ablation_seqlen": ["calibration.seqlen=32,64"]}
SMALLER |= {"frontier": ["evals.seqlen=[64,32]"]}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WikiText-2, PTB and C4 as the papers' protocol looks for them."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("wikitext-2-raw-v1/wiki.{}.raw", "ptb/ptb.{}.txt", "c4/c4-{}.jsonl"):
        for part in ("train", "validation" if name.startswith("c4") else "valid", "test"):
            path = folder / name.format(part)
            path.parent.mkdir(exist_ok=True)
            rows = [f"Sentence {number} of {path.name} says that, and no more than that.\n" for number in range(100)]
            if path.suffix == ".jsonl":
                rows = [json.dumps({"text": row * 20}) + "\n" for row in rows]
            path.write_text("".join(rows), encoding="utf-8")
    return folder


def end_of_sweep(name: str) -> list[str]:
    """The last value of every swept key, of the calibration sets all: the frontier has all methods."""
    node = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    swept = {
        key: str(values).split(",") for key, values in (OmegaConf.select(node, "hydra.sweeper.params") or {}).items()
    }
    whole = name == "frontier"
    return [f"{key}={','.join(v if whole or key == 'calibration' else v[-1:])}" for key, v in swept.items()]


def records_of(name: str, texts: Path, out: Path) -> list[dict[str, Any]]:
    """The records of an experiment that has to go well, without a word on stderr."""
    sizes = ["calibration.nsamples=4", "calibration.seqlen=64", "evals.seqlen=64", "evals.max_windows=3"]
    changed = {one.partition("=")[0]: one for one in [*end_of_sweep(name), *sizes, *SMALLER.get(name, [])]}
    folders = [f"hydra.sweep.dir={out}", f"hydra.run.dir={out}"]
    result = barber(f"experiment={name}", "model=tiny", f"data_dir={texts}", *changed.values(), *folders)
    assert (result.code, result.err) == (0, ""), result
    return [json.loads(path.read_text(encoding="utf-8")) for path in out.rglob("record.json")]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "frontier"])
def test_an_experiment_comes_to_its_end(name: str, texts: Path, tmp_path: Path) -> None:
    records = records_of(name, texts, tmp_path / "out")
    assert {record["status"] for record in records} == {"success"}
    for record in records:
        *_, last = record["results"].values()
        assert last["perplexity"]


def test_the_frontier_ends_with_a_table_and_a_picture_of_all_methods_and_both_lengths(
    texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    records = records_of("frontier", texts, out)
    assert len({record["choices"]["method"] for record in records}) == len(records) == 13
    for record in records:
        for kinds in record["results"].values():
            lengths = {text: found["seqlen"] for text, found in kinds["perplexity"].items()}
            assert lengths == {"wikitext2": 64, "wikitext2_32": 32}
    assert report([str(out)]) == 0
    table = (out / "report" / "table.md").read_text(encoding="utf-8")
    assert r"| perplexity, wikitext2 | perplexity, wikitext2\_32 |" in table
    assert sum(line.startswith("| tiny |") for line in table.splitlines()) == 13
    assert (out / "report" / "pareto.png").is_file()
