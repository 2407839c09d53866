"""`skip=[...]`: what is left out of a run stays dense, in memory and streamed, and where a run goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from barber.run import notes
from barber.run.identity import digest_of
from barber.walk.work import LayerWork
from tests import tiny
from tests.cli.running import barber, blocks_of, done, linear_weights, loaded, record_of, save_model

SKIP = "skip=[1,*.v_proj,'re:.*layers[.]3[.]mlp.*']"
OPTIONS = {
    "uniform": "rebuild.barber.alpha=0.9",
    "allocated, updated": "rebuild.barber.alpha=0.9 allocation=owl update=least_squares",
    "2:4": "pattern=2of4 rebuild=swaps cache=off",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(tiny.model("llama", num_hidden_layers=4).to(torch.bfloat16), folder / "model")
    save_file({"tokens": tiny.tokens(6, 32)}, folder / "tokens.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "plot_losses", lambda blocks, name, path: path.write_bytes(b""))


def is_left_out(name: str) -> bool:
    return "layers.1." in name or "v_proj" in name or "layers.3.mlp" in name


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_left_out_is_dense_and_both_figures_are_on_record(
    options: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = [f"model.path={inputs / 'model'}", f"calibration.path={inputs / 'tokens.safetensors'}"]
    command = ["model=local", "calibration=tokens", *source, "pruner=wanda", "evals=none", "export=hf", SKIP]
    command += OPTIONS[options].split()
    said = done(*command, f"hydra.run.dir={tmp_path / 'whole'}")
    streamed = [*command, "engine.streaming=true", f"hydra.run.dir={tmp_path / 'streamed'}"]
    begun = LayerWork.begun

    def interrupted(turn: Any, *given: Any) -> LayerWork:
        if turn.index == 2:
            raise KeyboardInterrupt
        return begun(turn, *given)

    monkeypatch.setattr(LayerWork, "begun", interrupted)
    assert barber(*streamed).code != 0
    monkeypatch.setattr(LayerWork, "begun", begun)
    assert "2 of 4 layers are done" in done(*streamed)
    assert blocks_of(tmp_path / "whole") == blocks_of(tmp_path / "streamed")

    dense = linear_weights(loaded(inputs / "model"))
    pruned, again = (linear_weights(loaded(tmp_path / name / "model")) for name in ("whole", "streamed"))
    for name, weight_OI in pruned.items():
        assert torch.equal(weight_OI, again[name]), name
        assert torch.equal(weight_OI, dense[name]) == is_left_out(name), name
    record = record_of(tmp_path / "whole")
    rest = [name for name in dense if not is_left_out(name)]
    zeros = {name: int((weight_OI == 0).sum()) for name, weight_OI in pruned.items()}
    weights = {name: weight_OI.numel() for name, weight_OI in dense.items()}
    assert sorted(record["linears"]) == sorted(rest)
    sparsity = sum(zeros[name] for name in rest) / sum(weights[name] for name in rest)
    assert record["sparsity"]["sparsity"] == sparsity == pytest.approx(0.5, abs=1e-3)
    overall = sum(zeros.values()) / sum(weights.values())
    assert record["sparsity"]["overall"] == overall < 0.4
    assert f"of all linears of the decoder layers {overall:.2%}" in said and "left dense" in said
    assert f"of all together it is {overall:.2%}" in (tmp_path / "whole/model/README.md").read_text(encoding="utf-8")


def test_a_job_that_skips_nothing_is_the_one_of_before_there_was_the_key() -> None:
    config = {"pruner": {"_target_": "barber.Wanda"}, "seed": 0}
    assert digest_of(config | {"skip": []}) == digest_of(config) != digest_of(config | {"skip": [1]})
