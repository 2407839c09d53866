"""`barber` under torchrun: one run, told and written by one of the processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.cli import running, under_torchrun
from tests.cli.running import barber, blocks_of, complaint, files_of, record_of, tensors_of
from tests.processes import Outcome, launch

NUM_SAMPLES = 5


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"tokens": tiny.tokens(NUM_SAMPLES, 64)}, path)
    return path


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes have their temporary folders: one that nobody else has."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def command(tokens: Path, out: Path, *more: str) -> list[str]:
    """A run of the tiny model, with texts that need not be made."""
    return [
        "model=tiny",
        "pruner=wanda",
        "rebuild.barber.alpha=0.9",
        "calibration=tokens",
        f"calibration.path={tokens}",
        "evals/text=tokens",
        f"evals.texts.tokens.path={tokens}",
        "evals.seqlen=64",
        "evals.max_windows=2",
        "evals.sample=null",
        "cache=off",
        *more,
        f"hydra.run.dir={out}",
    ]


def done(outcomes: list[Outcome]) -> None:
    """All processes have gone well, and none but the first has said anything."""
    assert [(outcome.code, outcome.err) for outcome in outcomes] == [(0, "")] * len(outcomes), outcomes
    assert [bool(outcome.out) for outcome in outcomes] == [True] + [False] * (len(outcomes) - 1), outcomes


def said_once(outcomes: list[Outcome]) -> str:
    """The sentence with which one process has refused a mistake; the others have kept silent."""
    (speaker,) = [outcome for outcome in outcomes if outcome.err]
    assert speaker.code == 2 and speaker.err.startswith("barber: ") and speaker.err.count("\n") == 1, outcomes
    assert all(outcome.code != 0 for outcome in outcomes), outcomes
    return speaker.err.removeprefix("barber: ").removesuffix("\n")


def check_same(folder: Path, whole: Path) -> None:
    """Two runs have left the same, to the bit."""
    assert blocks_of(folder) == blocks_of(whole)
    assert record_of(folder)["results"].keys() == {"dense", "pruned", "rebuilt"}
    for stage, results in record_of(whole)["results"].items():
        assert record_of(folder)["results"][stage]["perplexity"] == results["perplexity"], stage
    weights = tensors_of(whole / "model")
    assert weights and weights.keys() == tensors_of(folder / "model").keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in tensors_of(folder / "model").items())
    assert files_of(folder) == files_of(whole)


def test_torchrun_makes_one_run_of_two_processes(tokens: Path, tmp_path: Path, temporary: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    running.done(*command(tokens, alone))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*torchrun, "-m", "barber", *command(tokens, out)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process
    # Everything is told once.
    lines = process.stdout.splitlines()
    for beginning in ("Loaded ", "layer 0 of 2 attention", "Perplexity of the rebuilt", "Finished in", "record "):
        assert sum(line.startswith(beginning) for line in lines) == 1, process.stdout
    assert "Traceback" not in process.stderr
    # What was written is the folder of one run.
    assert files_of(out) == files_of(alone)
    assert (out / "run.log").read_text(encoding="utf-8").count("Finished in") == 1
    assert not list(temporary.glob("barber-*"))
    record, record_alone = record_of(out), record_of(alone)
    assert record["status"] == "success"
    assert (record["machine"]["processes"], record_alone["machine"]["processes"]) == (2, 1)
    assert record["calibration"] == record_alone["calibration"]
    assert (record["sparsity"], record["zeros"]) == (record_alone["sparsity"], record_alone["zeros"])
    for stage, results in record_alone["results"].items():
        perplexity = results["perplexity"]["tokens"]["perplexity"]
        assert record["results"][stage]["perplexity"]["tokens"]["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    weights, weights_alone = tensors_of(out / "model"), tensors_of(alone / "model")
    assert weights.keys() == weights_alone.keys()
    assert all(torch.equal(weight, weights_alone[name]) for name, weight in weights.items())


def test_the_processes_say_a_mistake_once(tokens: Path, tmp_path: Path) -> None:
    """Even where the one that leads is the last to see it, and torchrun ends what is there once one has failed."""
    function = under_torchrun.run_barber_with_a_late_leader
    arguments = command(tokens, tmp_path / "out", "pattern.sparsity=2")
    outcomes = launch(function, *arguments, size=2, folder=tmp_path, first_failure_ends_all=True)
    assert said_once(outcomes) == "pattern.sparsity must be at least 0 and below 1, not 2"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        # only the first process reads the texts
        (["evals.texts.tokens.path=nowhere"], "evals.texts.tokens.path must be a safetensors file"),
        (["evals.texts.tokens.path=nowhere", "export=none"], "evals.texts.tokens.path must be a safetensors file"),
        (["calibration.nsamples=1"], "torchrun started 2 processes, but there are 1 calibration samples"),
    ],
    ids=["text", "text, without a checkpoint", "samples"],
)
def test_so_it_is_with_mistakes_that_are_seen_later(
    changes: list[str], sentence: str, tokens: Path, tmp_path: Path, temporary: Path
) -> None:
    arguments = command(tokens, tmp_path / "out", *changes)
    outcomes = launch(under_torchrun.run_barber, *arguments, size=2, folder=tmp_path)
    assert said_once(outcomes).startswith(sentence)
    assert record_of(tmp_path / "out")["status"] == "failed"
    assert not list(temporary.glob("barber-*"))


def test_a_process_that_fails_says_so_and_none_goes_on_waiting(tokens: Path, tmp_path: Path) -> None:
    arguments = command(tokens, tmp_path / "out")
    outcomes = launch(under_torchrun.run_barber_with_too_little_memory, *arguments, size=2, folder=tmp_path)
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes
    assert "MemoryError: no room for the block" in outcomes[1].err and outcomes[0].err == ""
    record = record_of(tmp_path / "out")
    assert (record["status"], record["error"]) == ("failed", "MemoryError: no room for the block")


def test_a_sweep_is_refused_and_nobody_waits_for_its_second_job(tokens: Path, tmp_path: Path) -> None:
    sweep = ["-m", "seed=0,1", *command(tokens, tmp_path / "out")[:-1], f"hydra.sweep.dir={tmp_path / 'out'}"]
    outcomes = launch(
        under_torchrun.run_barber, *sweep, size=2, folder=tmp_path, timeout=20, first_failure_ends_all=True
    )
    assert "torchrun" in said_once(outcomes)


def test_a_rank_alone_is_no_torchrun(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*command(tokens, out)[:5], "evals=none", f"hydra.run.dir={out}"]
    (outcome,) = launch(under_torchrun.run_barber_alone_with_a_rank, *arguments, size=1, folder=tmp_path)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert "Finished in" in outcome.out and record_of(out)["machine"]["processes"] == 1


def test_tf32_is_refused_on_a_cpu(tokens: Path, tmp_path: Path) -> None:
    for field in ("forward", "gradient"):
        sentence = complaint(barber(*command(tokens, tmp_path / field, "device=cpu", f"precision.{field}=tf32")))
        assert sentence == f"precision.{field} must be float32 or bfloat16 on cpu: tf32 is for GPUs"


@pytest.mark.parametrize(
    ("ends", "more"),
    [
        pytest.param((0,), ("engine.streaming=true", "pruner=sparsegpt", "engine.activations=disk"), id="streaming"),
        # In the end all layers are finished: nobody computes, but those that help must not find the files gone.
        pytest.param((0, 1), ("precision.forward=bfloat16", "schedule=interleaved"), id="bfloat16"),
    ],
)
def test_interrupted_processes_go_on_where_they_were(
    ends: tuple[int, ...], more: tuple[str, ...], tokens: Path, tmp_path: Path
) -> None:
    """The activations of all of them were kept and are shared out again: the result has the bits of an unbroken run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done(launch(under_torchrun.run_barber, *command(tokens, whole, *more), size=2, folder=tmp_path / "1"))
    arguments = command(tokens, broken, *more)
    for last in ends:
        killed = launch(under_torchrun.run_barber_up_to_layer, last, *arguments, size=2, folder=tmp_path / "2")
        assert [outcome.code for outcome in killed] == [-signal.SIGKILL] * 2, killed
        assert len(blocks_of(broken)) == 2 * (last + 1) and not (broken / "model").exists()
    resumed = launch(under_torchrun.run_barber_with_late_helpers, *arguments, size=2, folder=tmp_path / "3")
    done(resumed)
    assert f"{len(ends)} of 2 layers are done" in resumed[0].out
    assert record_of(broken)["resumed"]["layers"] == len(ends)
    check_same(broken, whole)


def test_another_number_of_processes_is_another_run(tokens: Path, tmp_path: Path) -> None:
    """Their sums have other last bits."""
    arguments = command(tokens, tmp_path / "out")
    launch(under_torchrun.run_barber_up_to_layer, 0, *arguments, size=2, folder=tmp_path)
    assert "processes: 2 there, 1 here" in complaint(barber(*arguments))


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_threads_are_those_of_all_processes(streaming: bool, tokens: Path, tmp_path: Path) -> None:
    """With others than the leader's, a process adds up in another order and chooses other masks."""
    arguments = command(tokens, tmp_path / "out", "threads=2", f"engine.streaming={streaming}")
    outcomes = launch(under_torchrun.threads_of_barber, *arguments, size=2, folder=tmp_path / "said")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert [outcome.result for outcome in outcomes] == [2, 2]
