"""A run that is killed, wherever that happens, is gone on with by the same command, to the same bits."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from barber.run import notes, runner
from barber.run.tracking import Wandb
from barber.walk.walk import Walk
from barber.walk.work import LayerWork
from tests import tiny
from tests.cli.running import (
    Result,
    barber,
    blocks_of,
    complaint,
    contents,
    done,
    files_of,
    layers_of,
    record_of,
    save_model,
)
from tests.damage import DAMAGES, flip
from tests.processes import Outcome, launch

LAYERS = 4
KINDS = {
    "hf": ["export=hf"],
    "masks": ["export=masks"],
    "streamed hf": ["export=hf", "engine.streaming=true"],
    "streamed masks": ["export=masks", "engine.streaming=true"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers, the same with a NaN in the last but one, and token ids."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.model("llama", num_hidden_layers=LAYERS)
    save_model(model, folder / "model")
    with torch.no_grad():
        model.model.layers[LAYERS - 2].mlp.up_proj.weight[3, 5] = torch.nan
    save_model(model, folder / "broken")
    save_file({"tokens": tiny.tokens(6, 32)}, folder / "tokens.safetensors")
    save_file({"tokens": tiny.tokens(4, 32, seed=3)}, folder / "evaluation.safetensors")
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take as long as all the rest."""
    monkeypatch.setattr(notes, "plot_losses", _draw_nothing)


def _draw_nothing(blocks: object, name: str, path: Path) -> None:
    path.write_bytes(b"")


def command(inputs: Path, kind: str = "hf", model: str = "model", measured: bool = True) -> list[str]:
    """All but the run folder."""
    text = f"evals.texts.tokens.path={inputs / 'evaluation.safetensors'}"
    return [
        "model=local",
        f"model.path={inputs / model}",
        "calibration=tokens",
        f"calibration.path={inputs / 'tokens.safetensors'}",
        "pruner=wanda",
        "rebuild.barber.alpha=0.9",
        *(["evals/text=tokens", text, "evals.seqlen=32", "cache=off"] if measured else ["evals=none"]),
        *KINDS[kind],
    ]


def killed(arguments: list[str], where: str, folder: Path) -> Outcome:
    """Run a command that is killed (SIGKILL) before a file gets its name, or before a stage is measured."""
    (outcome,) = launch(_run_to_be_killed, arguments, where, size=1, folder=folder)
    assert outcome.code == -signal.SIGKILL, outcome
    return outcome


def _run_to_be_killed(arguments: list[str], where: str) -> Result:
    def dying(function: Callable[..., Any], matches: Callable[..., bool]) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            if matches(*given):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return step

    Path.rename = dying(Path.rename, lambda _, to: Path(to).name == where)  # type: ignore[method-assign]
    evaluate = runner._Run._measure
    runner._Run._measure = dying(evaluate, lambda _, stage, *__: stage == where)  # type: ignore[method-assign]
    return barber(*arguments)


def run_in_another_process(arguments: list[str]) -> Result:
    return barber(*arguments)


def finished_in(folder: Path) -> int:
    return len(list((folder / "checkpoint").glob("layer-*.json")))


def assert_the_same(folder: Path, expected: Path) -> None:
    """Two run folders differ in times alone."""
    record, other = record_of(folder), record_of(expected)
    assert record["status"] == "success"
    for key in ("results", "sparsity", "linears", "zeros", "calibration", "files", "seeds"):
        assert record[key] == other[key], key
    assert blocks_of(folder) == blocks_of(expected)
    for file in sorted(files_of(expected)):
        if file.startswith("model/") or file == "masks.safetensors":
            assert (folder / file).read_bytes() == (expected / file).read_bytes(), file
    assert files_of(folder) == files_of(expected)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are computed in this process from now on."""
    layers: list[int] = []
    compute = Walk._layer

    def note(self: Walk, work: LayerWork, *arguments: Any) -> Any:
        layers.append(work.index)
        return compute(self, work, *arguments)

    monkeypatch.setattr(Walk, "_layer", note)
    return layers


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folders of runs that nothing interrupts, by kind; each is made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole")
            done(*command(inputs, kind), f"hydra.run.dir={made[kind]}")
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def interrupted_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in memory that was killed when two layers were finished."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    killed([*command(inputs), f"hydra.run.dir={folder}"], "layer-00002.json", folder.parent / "said")
    assert finished_in(folder) == 2
    return folder


@pytest.fixture
def interrupted(interrupted_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(interrupted_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "where", "finished"),
    [
        ("hf", "layer-00000.json", 0),
        ("hf", "pruned-00001.safetensors", 1),
        ("masks", "pruned", LAYERS),
        ("streamed hf", "layer-00002.json", 2),
        ("streamed hf", "model", LAYERS),
        ("streamed masks", "masks.safetensors", LAYERS),
    ],
)
def test_a_killed_run_is_gone_on_with_to_the_same_bits(
    kind: str,
    where: str,
    finished: int,
    inputs: Path,
    whole: Callable[[str], Path],
    computed: list[int],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    arguments = [*command(inputs, kind), f"hydra.run.dir={out}"]
    killed(arguments, where, tmp_path / "said")
    assert record_of(out)["status"] == "started"
    assert finished_in(out) == finished
    assert not (out / "model").exists()
    first = layers_of(out)
    if where == "model":
        assert list(out.glob(".model.*.unfinished/config.json"))

    expected = whole(kind)
    computed.clear()
    said = done(*arguments)
    assert computed == list(range(finished, LAYERS))
    going_on = f"Going on with the interrupted run in {out}: {finished} of {LAYERS} layers are done."
    assert (going_on in said) == (finished > 0)
    assert (going_on in (out / "run.log").read_text(encoding="utf-8")) == (finished > 0)
    assert record_of(out)["resumed"] == ({"from": str(out), "layers": finished} if finished else None)
    assert [line["seconds"] for line in layers_of(out)][: 2 * finished] == [line["seconds"] for line in first][
        : 2 * finished
    ]
    assert_the_same(out, expected)


def test_a_run_may_be_killed_again(
    inputs: Path, interrupted: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = [*command(inputs), f"hydra.run.dir={interrupted}"]
    killed(arguments, "layer-00003.json", tmp_path / "said")
    assert finished_in(interrupted) == 3
    done(*arguments)
    assert_the_same(interrupted, whole("hf"))


def test_a_real_process_is_refused_while_it_runs_and_gone_on_with_when_it_is_killed(
    inputs: Path, whole: Callable[[str], Path], computed: list[int], tmp_path: Path
) -> None:
    """The command as a shell runs it, but that it waits after its second layer for what will come."""
    out = tmp_path / "run"
    program = """
import sys, time
from barber import cli
from barber.model import checkpoint

finish = checkpoint.Checkpoint.finish_layer

def finish_and_wait(self, index, *arguments):
    finish(self, index, *arguments)
    if index == 1:
        self.wait()
        time.sleep(120)

checkpoint.Checkpoint.finish_layer = finish_and_wait
cli.main()
"""
    arguments = [*command(inputs), f"hydra.run.dir={out}"]
    expected = whole("hf")
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 60
        while not (out / "checkpoint" / "layer-00001.json").exists():
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        sentence = complaint(barber(*arguments))
        assert sentence == f"hydra.run.dir is the folder of a run that is still going on, {out}; choose another"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    computed.clear()
    done(*arguments)
    assert computed == list(range(2, LAYERS))
    assert_the_same(out, expected)


def test_who_is_refused_leaves_the_folder_of_the_other_run_as_it_is(inputs: Path, interrupted: Path) -> None:
    (interrupted / ".source").mkdir()
    (interrupted / ".source" / "model.safetensors").write_bytes(b"what a random model is streamed from")
    record = (interrupted / "record.json").read_bytes()
    with FileLock(interrupted / ".lock"):
        assert barber(*command(inputs), f"hydra.run.dir={interrupted}").code == 2
    assert (interrupted / ".source" / "model.safetensors").exists()
    assert (interrupted / "record.json").read_bytes() == record


# Folders that tell the time


def test_the_next_folder_of_the_default_kind_takes_over(
    inputs: Path, whole: Callable[[str], Path], computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole("hf")
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "outputs" / "runs"
    (outcome,) = launch(_run_there_to_be_killed, tmp_path, command(inputs), "layer-00002.json", size=1, folder=tmp_path)
    assert outcome.code == -signal.SIGKILL
    (first,) = runs.iterdir()
    computed.clear()
    while time.strftime("%Y-%m-%d_%H-%M-%S") <= first.name[:19]:
        time.sleep(0.05)
    said = done(*command(inputs))
    (second,) = set(runs.iterdir()) - {first}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_model_unstructured_wanda_barber", second.name)
    assert computed == [2, 3]
    assert f"Going on with the interrupted run in {first}: 2 of {LAYERS} layers are done." in said
    assert record_of(second)["resumed"] == {"from": str(first), "layers": 2}
    assert_the_same(second, expected)
    assert not (first / "checkpoint").exists()
    assert record_of(first)["status"] == "started"


def _run_there_to_be_killed(folder: Path, arguments: list[str], where: str) -> Result:
    os.chdir(folder)
    return _run_to_be_killed(arguments, where)


def test_a_folder_of_another_time_takes_over_what_has_the_same_settings_and_nothing_else(
    inputs: Path, interrupted: Path, computed: list[int], tmp_path: Path
) -> None:
    first = interrupted.rename(tmp_path / "2026-01-01_10-00-00_mine")
    others = [tmp_path / name for name in ("2026-01-02_10-00-00_mine", "2026-01-02_10-00-00_yours")]
    done(*command(inputs, measured=False), "rebuild.barber.alpha=0.5", f"hydra.run.dir={others[0]}")
    done(*command(inputs, measured=False), f"hydra.run.dir={others[1]}")
    assert computed == 2 * list(range(LAYERS))
    assert [record_of(other)["resumed"] for other in others] == [None, None]
    computed.clear()
    third = tmp_path / "2026-01-03_10-00-00_mine"
    done(*command(inputs, measured=False), f"hydra.run.dir={third}")
    assert computed == [2, 3]
    assert record_of(third)["resumed"] == {"from": str(first), "layers": 2}


# What has to be the same


@contextmanager
def replaced(path: Path, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Another file in the place of one."""
    kept = path.rename(path.with_suffix(".kept"))
    save_file(tensors, path, {"format": "pt"})
    try:
        yield
    finally:
        kept.rename(path)


DIFFERING = {
    "rebuild.barber.alpha=0.5": "rebuild.barber.alpha: 0.9 there, 0.5 here",
    "batch_size=2": "batch_size: None there, 2 here",
    "schedule=interleaved": "schedule: paper there, interleaved here",
    "engine.streaming=true": "engine.streaming: auto there, True here",
}


def test_other_settings_are_refused_by_key_with_both_values_and_nothing_is_lost_by_it(
    inputs: Path, interrupted: Path, whole: Callable[[str], Path], computed: list[int]
) -> None:
    expected = whole("hf")
    before = contents(interrupted / "checkpoint")
    for change, differing in DIFFERING.items():
        sentence = complaint(barber(*command(inputs), change, f"hydra.run.dir={interrupted}"))
        assert sentence == (
            f"hydra.run.dir holds an unfinished run with other settings ({differing}); "
            "give the same ones, or choose another folder"
        )
        assert contents(interrupted / "checkpoint") == before
    for change in ("pruner=magnitude", "rebuild=none", "pattern=2of4"):
        assert barber(*command(inputs), change, f"hydra.run.dir={interrupted}").code == 2
    computed.clear()
    done(*command(inputs), f"hydra.run.dir={interrupted}")
    assert computed == [2, 3]
    assert_the_same(interrupted, expected)


def test_other_samples_in_the_same_file_are_other_settings(inputs: Path, interrupted: Path) -> None:
    with replaced(inputs / "tokens.safetensors", {"tokens": tiny.tokens(6, 32, seed=7)}):
        sentence = complaint(barber(*command(inputs), f"hydra.run.dir={interrupted}"))
    assert re.search(r"\(calibration_digest: [0-9a-f]+ there, [0-9a-f]+ here\)", sentence)


@pytest.mark.parametrize("change", ["name=other", "evals.stages=[rebuilt]", "export=masks", "tracker=wandb"], ids=str)
def test_what_the_layers_do_not_depend_on_may_be_another(
    change: str,
    inputs: Path,
    interrupted: Path,
    whole: Callable[[str], Path],
    computed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in ("check", "start", "block", "finish"):
        monkeypatch.setattr(Wandb, step, lambda *_: None)
    expected = whole("hf")
    computed.clear()
    done(*command(inputs), change, f"hydra.run.dir={interrupted}")
    assert computed == [2, 3]
    assert record_of(interrupted)["linears"] == record_of(expected)["linears"]
    if change == "export=masks":
        expected = whole("masks")
        masks = "masks.safetensors"
        assert (interrupted / masks).read_bytes() == (expected / masks).read_bytes()
    else:
        weights = "model/model.safetensors"
        assert (interrupted / weights).read_bytes() == (expected / weights).read_bytes()
    assert not (interrupted / "checkpoint").exists()


def test_a_run_that_keeps_no_layers_goes_on_with_those_that_are_there(
    inputs: Path, interrupted: Path, computed: list[int]
) -> None:
    done(*command(inputs), "export=none", f"hydra.run.dir={interrupted}")
    assert computed == [2, 3]
    assert not (interrupted / "checkpoint").exists()


@pytest.mark.parametrize("kind", ["hf", "streamed hf"])
def test_resume_never_refuses_the_folder_of_an_unfinished_run(
    kind: str, inputs: Path, interrupted: Path, tmp_path: Path
) -> None:
    if kind != "hf":
        interrupted = tmp_path / "streamed"
        killed([*command(inputs, kind), f"hydra.run.dir={interrupted}"], "layer-00002.json", tmp_path / "said")
    sentence = complaint(barber(*command(inputs, kind), "resume=never", f"hydra.run.dir={interrupted}"))
    assert sentence == "hydra.run.dir holds an unfinished run; resume=auto goes on with it, or choose another"
    assert finished_in(interrupted) == 2


# What may be found


def test_a_run_that_fails_keeps_its_layers(inputs: Path, computed: list[int], tmp_path: Path) -> None:
    out = tmp_path / "run"
    sentence = f"model.layers.{LAYERS - 2}.mlp.up_proj: the weight is NaN or infinite"
    arguments = [*command(inputs, model="broken", measured=False), f"hydra.run.dir={out}"]
    (outcome,) = launch(run_in_another_process, arguments, size=1, folder=tmp_path / "said")
    assert (outcome.result.code, outcome.result.err) == (1, f"barber: {sentence}\n")
    assert finished_in(out) == LAYERS - 2
    assert not [file for file in files_of(out) if "unfinished" in file]
    again = barber(*arguments)
    assert (again.code, again.err) == (1, f"barber: {sentence}\n")
    assert computed == [LAYERS - 2]
    assert len(layers_of(out)) == 2 * (LAYERS - 2)
    assert record_of(out)["resumed"]["layers"] == LAYERS - 2
    assert finished_in(out) == LAYERS - 2


def test_what_a_kill_left_half_written_does_no_harm(
    inputs: Path, interrupted: Path, whole: Callable[[str], Path]
) -> None:
    for name in ("layer-00002.safetensors", "activations-00003.safetensors", "pruned-00002.safetensors"):
        (interrupted / "checkpoint" / f".{name}.abc.unfinished").write_bytes(b"half")
    (interrupted / "checkpoint" / ".layer-00002.json.abc.unfinished").write_text("[{")
    (interrupted / "checkpoint" / ".settings.json.abc.unfinished").write_text("{")
    (interrupted / ".record.json.abc.unfinished").write_text("{")
    (interrupted / ".model.abc.unfinished").mkdir()
    (interrupted / ".model.abc.unfinished" / "model.safetensors").write_bytes(b"half")
    with (interrupted / "layers.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"layer": 2, "blo')
    expected = whole("hf")
    done(*command(inputs), f"hydra.run.dir={interrupted}")
    assert_the_same(interrupted, expected)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("layer-00001.safetensors", "half"),
        ("activations-00002.safetensors", "a bit"),
        ("layer-00000.json", "an empty object"),
        ("layer-00001.json", "a folder"),
        ("pruned-00000.safetensors", "gone"),
        ("model.json", "a bit"),
        ("settings.json", "nothing"),
    ],
)
def test_damage_is_told_and_its_layers_are_done_anew(
    name: str, damage: str, inputs: Path, interrupted: Path, whole: Callable[[str], Path], computed: list[int]
) -> None:
    """All of them: what the layers begin with is there for the last one only."""
    expected = whole("hf")
    DAMAGES[damage](interrupted / "checkpoint" / name)
    computed.clear()
    said = done(*command(inputs), f"hydra.run.dir={interrupted}")
    assert len(re.findall(rf"/{re.escape(name)} [^;]*; all layers[^.]* are computed again\.", said)) == 1
    assert computed == list(range(LAYERS))
    assert record_of(interrupted)["resumed"] is None
    assert_the_same(interrupted, expected)


@pytest.mark.parametrize("kind", ["hf", "streamed hf"])
def test_a_layer_whose_predecessor_left_its_activations_is_done_anew_alone(
    kind: str, inputs: Path, whole: Callable[[str], Path], computed: list[int], tmp_path: Path
) -> None:
    out, expected = tmp_path / "run", whole(kind)
    killed([*command(inputs, kind), f"hydra.run.dir={out}"], "model", tmp_path / "said")
    before = shutil.copytree(out, tmp_path / "copy")
    shutil.rmtree(out)
    killed([*command(inputs, kind), f"hydra.run.dir={out}"], "layer-00003.json", tmp_path / "said")
    for name in ("layer-00003.json", "layer-00003.safetensors", "pruned-00003.safetensors"):
        shutil.copy(before / "checkpoint" / name, out / "checkpoint")
    flip(out / "checkpoint" / "layer-00003.safetensors")
    computed.clear()
    said = done(*command(inputs, kind), f"hydra.run.dir={out}")
    assert "layer-00003.safetensors is damaged, it has other bytes than were written; layers 3 to 3 are" in said
    assert computed == [3]
    assert_the_same(out, expected)


# Other weights


def test_other_weights_are_refused_by_file_unless_they_look_like_the_same(
    inputs: Path, interrupted: Path, whole: Callable[[str], Path]
) -> None:
    expected, file = whole("hf"), inputs / "model" / "model.safetensors"
    arguments = [*command(inputs), f"hydra.run.dir={interrupted}"]
    original, times = file.read_bytes(), file.stat()
    try:
        flip(file, 0.2)  # in a finished layer
        refused = [barber(*arguments, "resume=verify")]
        os.utime(file)
        refused.append(barber(*arguments))
        assert finished_in(interrupted) == 2
    finally:
        file.write_bytes(original)  # the same with another time
    sentence = (
        f"hydra.run.dir holds an unfinished run of other weights: {file} is not what it was; "
        f"put back what was there, or remove {interrupted / 'checkpoint'} to begin anew"
    )
    assert [complaint(result) for result in refused] == 2 * [sentence]
    done(*arguments)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert_the_same(interrupted, expected)


def test_layers_of_unknown_settings_are_not_mixed_with_others(inputs: Path, interrupted: Path, tmp_path: Path) -> None:
    (interrupted / "checkpoint" / "settings.json").write_text("")
    done(*command(inputs, measured=False), "pattern=2of4", f"hydra.run.dir={interrupted}")
    weights = AutoModelForCausalLM.from_pretrained(interrupted / "model").state_dict()
    for name, weight in weights.items():
        if "proj" in name:
            assert ((weight.reshape(-1, 4) == 0).sum(dim=1) == 2).all(), name
