"""Sweeps: nothing is computed twice, a failure stops no other job, what is done is skipped."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from barber.errors import UserError
from barber.evals.results import StageResults
from barber.run import identity, notes, sweeps
from barber.run.identity import counting, digest_of
from barber.run.reading import read
from barber.run.sweeps import objective
from barber.runtime.seals import sealed
from barber.walk.selection import Selection
from barber.walk.walk import Walk
from tests import records, tiny
from tests.cli.running import barber, complaint, done


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"tokens": tiny.tokens(5, 64)}, path)
    return path


@pytest.fixture(autouse=True)
def of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache and no pictures, which take as long as all the rest."""
    monkeypatch.setenv("BARBER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(notes, "plot_losses", lambda blocks, name, path: path.write_bytes(b""))


def sweep(tokens: Path, out: Path, *more: str) -> list[str]:
    return [
        "-m",
        "model=tiny",
        "pruner=wanda",
        "calibration=tokens",
        f"calibration.path={tokens}",
        "evals/text=tokens",
        f"evals.texts.tokens.path={tokens}",
        "evals.seqlen=64",
        "evals.max_windows=2",
        "evals.sample=null",
        "export=none",
        f"hydra.sweep.dir={out}",
        *more,
    ]


def jobs_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "jobs.jsonl").read_text().splitlines()]


def records_of(out: Path) -> dict[str, dict[str, Any]]:
    """Records by the overrides of the job."""
    found = [json.loads(path.read_text()) for path in out.glob("*/record.json")]
    return {" ".join(record["overrides"]): record for record in found}


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on where, when and with what help a run was made."""
    results = {
        stage: {text: {k: v for k, v in found.items() if k != "cached"} for text, found in kinds["perplexity"].items()}
        for stage, kinds in record["results"].items()
    }
    return {"results": results, "linears": record["linears"], "sparsity": record["sparsity"]}


def test_a_sweep_ends_with_a_table_of_its_points(tokens: Path, tmp_path: Path) -> None:
    out = done(*sweep(tokens, tmp_path / "out", "rebuild.barber.alpha=0.1,0.9", "pattern.sparsity=0.5,0.6"))
    table = out[out.rindex("\njob ") :]
    for alpha in ("0.1", "0.9"):
        for sparsity in ("0.5", "0.6"):
            row = rf"rebuild.barber.alpha={alpha} +done +tokens \d.*\npattern.sparsity={sparsity}"
            assert re.search(row, table), table
    assert "calibration.path" not in table  # common to all
    assert f"4 done, 0 skipped, 0 failed; barber report {tmp_path / 'out'}" in table
    assert len(records_of(tmp_path / "out")) == 4


def test_a_list_of_steps_names_a_job_as_it_was_written(tokens: Path, tmp_path: Path) -> None:
    out = done(*sweep(tokens, tmp_path, "rebuild=[barber,swaps],[swaps]"))
    for steps in ("barber,swaps", "swaps"):
        assert re.search(rf"^rebuild=\[{steps}\] +done", out, re.MULTILINE), out


def test_a_sweep_has_a_folder_of_its_experiments_or_its_runs_name(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [argument for argument in sweep(tokens, tmp_path) if not argument.startswith("hydra.sweep.dir")]
    done(*arguments, "seed=0,1")
    smaller = ["seed=0", "method=wanda_barber", "calibration.nsamples=5", "calibration.seqlen=64"]
    done(*arguments[1:], "experiment=ablation_schedule", *smaller)
    folders = {
        folder.name: len(list(folder.glob("*/record.json"))) for folder in (tmp_path / "outputs/sweeps").iterdir()
    }
    assert folders == {"tiny_unstructured_wanda_barber": 2, "ablation_schedule": 2}


@contextmanager
def failing_at_2_of_4(error: BaseException) -> Iterator[None]:
    walk_on = Walk.__iter__

    def fail(walk: Walk) -> Any:
        if "2:4" in str(walk.pattern):
            raise error
        return walk_on(walk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "__iter__", fail)
        yield


def test_what_is_done_is_skipped_and_what_failed_runs_again(tokens: Path, tmp_path: Path) -> None:
    arguments = sweep(tokens, tmp_path / "out", "pattern=unstructured,2of4,4of8")
    with failing_at_2_of_4(MemoryError("no room for the block")):
        result = barber(*arguments)
    assert result.code == 1
    assert [job["status"] for job in jobs_of(tmp_path / "out")] == ["done", "failed", "done"]
    assert "barber: MemoryError: no room for the block" in result.err
    assert "2 done, 0 skipped, 1 failed" in result.out
    assert re.search(r"failed: pattern=2of4: MemoryError: no room for the block \(.*record.json\)", result.out)
    before = records_of(tmp_path / "out")
    out = done(*arguments)
    assert [job["status"] for job in jobs_of(tmp_path / "out")][3:] == ["skipped", "done", "skipped"]
    assert "1 done, 2 skipped, 0 failed" in out
    after = records_of(tmp_path / "out")
    assert len(after) == 3 and all(record["status"] == "success" for record in after.values())
    assert [key for key in after if after[key] != before[key]] == [key for key in after if "2of4" in key]


def test_an_interrupt_ends_the_sweep_which_goes_on_where_it_was(tokens: Path, tmp_path: Path) -> None:
    arguments = sweep(tokens, tmp_path / "out", "pattern=unstructured,2of4,4of8")
    with failing_at_2_of_4(KeyboardInterrupt()):
        result = barber(*arguments)
    assert (result.code, result.err) == (130, "barber: interrupted\n")
    assert "1 done, 0 skipped, 1 failed" in result.out
    assert "2 done, 1 skipped, 0 failed" in done(*arguments)


def test_a_users_mistake_in_one_job_stops_no_other(tokens: Path, tmp_path: Path) -> None:
    result = barber(*sweep(tokens, tmp_path / "out", "pattern.sparsity=2,0.5"))
    assert result.code == 1
    assert result.err == "barber: pattern.sparsity must be at least 0 and below 1, not 2\n"
    assert [job["status"] for job in jobs_of(tmp_path / "out")] == ["failed", "done"]


def test_a_mistake_in_all_jobs_is_told_before_anything_runs(tokens: Path, tmp_path: Path) -> None:
    sentence = complaint(barber(*sweep(tokens, tmp_path / "out", "rebuild.barber.alpha=0.1,0.9", "rebuild.alhpa=1")))
    assert sentence == "rebuild.alhpa: no such key, did you mean rebuild.barber.alpha?"
    assert not (tmp_path / "out" / "jobs.jsonl").exists()


def test_resume_never_does_all_of_it_again(tokens: Path, tmp_path: Path) -> None:
    arguments = sweep(tokens, tmp_path / "out", "rebuild.barber.alpha=0.1,0.9", "resume=never")
    done(*arguments)
    assert "2 done, 0 skipped, 0 failed" in done(*arguments)


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every time that a walk collects statistics for initial masks, by layer."""
    seen: list[str] = []
    prune_layer = Selection.prune_layer

    def note(selection: Selection, work: Any, stream: Any) -> None:
        seen.append(f"{selection.pruner} {work.index}")
        prune_layer(selection, work, stream)

    monkeypatch.setattr(Selection, "prune_layer", note)
    return seen


@pytest.mark.parametrize(("pruner", "streaming"), [("wanda", "false"), ("wanda", "true"), ("sparsegpt", "false")])
def test_the_initial_masks_of_a_sweep_are_computed_once_and_change_no_bit(
    pruner: str, streaming: str, tokens: Path, tmp_path: Path, phases: list[str]
) -> None:
    point = [f"pruner={pruner}", f"engine.streaming={streaming}", "export=masks", "rebuild.barber.alpha=0.1,0.9"]
    done(*sweep(tokens, tmp_path / "kept", *point))
    assert len(phases) == 2  # layers
    done(*sweep(tokens, tmp_path / "alone", *point, "cache=off"))
    assert len(phases) == 2 + 2 * 2
    kept, alone = records_of(tmp_path / "kept"), records_of(tmp_path / "alone")
    assert sorted(record["initial"]["known"] for record in kept.values()) == [False, True]
    assert len({record["initial"]["seconds"] for record in kept.values()}) == 1  # what it took once
    assert {record["initial"] for record in alone.values()} == {None}
    for key, record in kept.items():
        other = alone[f"{key} cache=off"]
        assert record["digest"] == other["digest"]
        assert figures(record) == figures(other)
    for folder in (tmp_path / "kept").glob("*/masks.safetensors"):
        assert folder.read_bytes() == (tmp_path / "alone" / folder.parent.name / folder.name).read_bytes()


def test_an_initial_mask_alone_is_taken_from_a_rebuilding_and_the_other_way_round(
    tokens: Path, tmp_path: Path, phases: list[str]
) -> None:
    done(*sweep(tokens, tmp_path / "out", "rebuild=none,barber"))
    assert len(phases) == 2
    alone, rebuilt = sorted(records_of(tmp_path / "out").values(), key=lambda record: len(record["results"]))
    assert figures(alone)["results"]["pruned"] == figures(rebuilt)["results"]["pruned"]
    assert "cached" in rebuilt["results"]["pruned"]["perplexity"]["tokens"]


OTHERS = ["seed=1", "batch_size=1", "precision.forward=bfloat16", "calibration.nsamples=4", "pattern.sparsity=0.4"]


def test_other_initial_masks_are_computed(tokens: Path, tmp_path: Path, phases: list[str]) -> None:
    for change in ("rebuild.barber.alpha=0.5", *OTHERS):
        phases.clear()
        done(*sweep(tokens, tmp_path / "out", change))
        assert len(phases) == 2, change


def test_an_interleaved_run_neither_takes_nor_gives_initial_masks(tokens: Path, tmp_path: Path) -> None:
    done(*sweep(tokens, tmp_path / "out", "schedule=interleaved,paper"))
    by_schedule = {record["config"]["schedule"]: record["initial"] for record in records_of(tmp_path / "out").values()}
    assert by_schedule["interleaved"] is None
    assert by_schedule["paper"]["known"] is False and by_schedule["paper"]["seconds"] > 0


def test_a_run_that_was_killed_completes_the_initial_masks_when_it_goes_on(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phases: list[str]
) -> None:
    look = Walk._look

    def stop_in_the_second_layer(walk: Walk, work: Any, *rest: Any) -> Any:
        if work.index == 1:
            raise MemoryError
        return look(walk, work, *rest)

    arguments = sweep(tokens, tmp_path / "out", "export=hf")
    with monkeypatch.context() as patch:
        patch.setattr(Walk, "_look", stop_in_the_second_layer)
        assert barber(*arguments).code == 1
    done(*arguments)
    assert len(phases) == 3
    phases.clear()
    done(*sweep(tokens, tmp_path / "other", "rebuild.barber.alpha=0.7"))
    assert phases == []


# ---------------------------------------------------------------------------------------------------------------------
# Which runs are the same


PLACES = ["name", "resume", "data_dir"]


@given(st.sampled_from(PLACES), st.text(max_size=5))
def test_names_and_places_make_no_other_run(key: str, value: str) -> None:
    config = {"name": "a", "resume": "auto", "data_dir": None, "pattern": {"sparsity": 0.5}, "x": [{"data_dir": "d"}]}
    assert digest_of(config | {key: value}) == digest_of(config)
    assert digest_of(config | {"x": [{"data_dir": value}]}) == digest_of(config)
    assert digest_of(config | {"pattern": {"sparsity": 0.6}}) != digest_of(config)
    assert digest_of(config | {"seed": 1}) != digest_of(config)


def test_a_key_that_is_added_later_makes_no_other_run_where_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"rebuild": {"swaps": {"rounds": 50}}, "evals": {"texts": {"ptb": {"split": "test"}}}}
    after = {"rebuild": {"swaps": {"rounds": 50, "made_up": 0}}, "evals": before["evals"], "made_up_group": None}
    assert digest_of(after) != digest_of(before)
    monkeypatch.setattr(identity, "_ADDED", {"rebuild.*.made_up": 0, "made_up_group": None})
    assert digest_of(after) == digest_of(before)
    for value in (1, None, "0"):
        other = {**after, "rebuild": {"swaps": {"rounds": 50, "made_up": value}}}
        assert digest_of(other) != digest_of(before)


def test_finished_layers_do_not_depend_on_what_comes_after_them() -> None:
    config = {"evals": {"seqlen": 8}, "export": None, "batch_size": 2, "update": {"reconstruct": {"batch_size": 2}}}
    layers = counting(config, "layers")
    assert layers == {"batch_size": 2, "update": {"reconstruct": {"batch_size": 2}}}
    assert digest_of(config) != digest_of(config | {"evals": None})


def test_a_finished_job_is_found_whatever_its_name(tokens: Path, tmp_path: Path) -> None:
    done(*sweep(tokens, tmp_path / "out", "name=first"))
    (folder,) = (path.parent for path in (tmp_path / "out").glob("*/record.json"))
    assert folder.name.startswith("first-")
    assert "0 done, 1 skipped, 0 failed" in done(*sweep(tokens, tmp_path / "out", "name=second"))
    renamed = folder.rename(folder.with_name(f"third-{folder.name.partition('-')[2]}"))
    assert "0 done, 1 skipped, 0 failed" in done(*sweep(tokens, tmp_path / "out"))
    assert [path.parent for path in (tmp_path / "out").glob("*/record.json")] == [renamed]


def test_a_job_is_found_in_its_folder_by_the_digest_in_its_record(tokens: Path, tmp_path: Path) -> None:
    done(*sweep(tokens, tmp_path / "out", "tracker=none"))
    (record,) = records_of(tmp_path / "out").values()
    (folder,) = (path.parent for path in (tmp_path / "out").glob("*/record.json"))
    assert record["digest"] == digest_of(record["config"])
    assert folder.name == f"tiny_unstructured_wanda_barber-{record['digest'][:12]}"
    assert record["choices"]["pruner"] == "wanda" and record["choices"]["experiment"] is None


def rewrite(out: Path, **changes: Any) -> Path:
    """Change the record of the only job; its file."""
    (file,) = out.glob("*/record.json")
    content = json.loads(file.read_text()) | changes
    del content["sha256"]
    file.write_text(json.dumps(sealed(content)))
    return file


def test_a_job_that_the_version_before_has_done_is_done(tokens: Path, tmp_path: Path) -> None:
    done(*sweep(tokens, tmp_path / "out"))
    rewrite(tmp_path / "out", version=1)
    out = done(*sweep(tokens, tmp_path / "out"))
    assert "0 done, 1 skipped, 0 failed" in out and re.search(r"skipped +tokens \d", out)


def test_a_job_with_a_damaged_record_is_done_over(tokens: Path, tmp_path: Path) -> None:
    done(*sweep(tokens, tmp_path / "out"))
    file = rewrite(tmp_path / "out", results={"rebuilt": {"perplexity": {"tokens": {"perplexity": "3"}}}})
    assert "1 done, 0 skipped, 0 failed" in done(*sweep(tokens, tmp_path / "out"))
    assert read(file).status == "success"


def test_what_a_later_version_has_done_is_left_alone(tokens: Path, tmp_path: Path) -> None:
    done(*sweep(tokens, tmp_path / "out"))
    file = rewrite(tmp_path / "out", version=4)
    before, sentence = file.read_bytes(), "must be a record of version 3 at most, not 4: upgrade llm-barber to read it"
    single = [argument for argument in sweep(tokens, tmp_path) if argument not in ("-m", f"hydra.sweep.dir={tmp_path}")]
    for arguments in (sweep(tokens, tmp_path / "out"), [*single, f"hydra.run.dir={file.parent}"]):
        result = barber(*arguments)
        assert result.code != 0 and f"{file} {sentence}" in result.err and "Traceback" not in result.err
        assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        (["method=magnitude,best_mask", "pattern=2of4,4of8"], "tiny_pattern_method"),
        (["pruner=magnitude,wanda", "update=none,[admm,least_squares]"], "tiny_unstructured_pruner_barber_update"),
        (["method=magnitude,best_mask", "pattern.sparsity=0.5,1.5"], "tiny_unstructured_method"),
    ],
)
def test_a_sweep_over_choices_has_one_folder_and_an_end_that_counts_all_jobs(
    swept: list[str], name: str, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    left = ("hydra.sweep.dir", "pruner=wanda")
    arguments = [*(one for one in sweep(tokens, tmp_path) if not one.startswith(left)), *swept]
    result = barber(*arguments)
    failed = 2 if "pattern.sparsity=0.5,1.5" in swept else 0
    assert f"{4 - failed} done, 0 skipped, {failed} failed; " in result.out, result
    assert result.code == min(failed, 1)
    assert [path.name for path in (tmp_path / "outputs" / "sweeps").iterdir()] == [name]
    begun = re.findall(r"^Job (\d) of 4(?:, less than a minute left)?: (.*)$", result.out, re.MULTILINE)
    assert [number for number, _ in begun] == ["1", "2", "3", "4"]
    firsts = [re.sub(r"=(\[.*?\]|[^,]*),.*", r"=\1", each) for each in swept]
    assert begun[0][1].split() == firsts and len({point for _, point in begun}) == 4
    again = barber(*arguments)
    assert f"0 done, {4 - failed} skipped, {failed} failed; " in again.out, again


# ---------------------------------------------------------------------------------------------------------------------
# Searches


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("rebuilt.perplexity.tokens", "objective must name a figure of the results; rebuilt.perplexity.tokens is dict"),
        ("rebuilt.kl", "objective must name a figure of the results: rebuilt.kl has no kl, there is perplexity"),
    ],
)
def test_an_objective_that_is_no_figure_is_refused(key: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        objective({"rebuilt": StageResults({"tokens": records.perplexity(20.0)})}, key)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("key", "figure"),
    [
        ("rebuilt.perplexity.text.nll_per_token", math.log(20.0)),
        ("rebuilt.agreement.text.kl_divergence", 0.25),
        ("rebuilt.zero_shot.mean_acc", 0.5),
        ("rebuilt.zero_shot.tasks.boolq.acc_stderr", 0.1),
    ],
)
def test_an_objective_is_named_by_its_keys_in_the_record(key: str, figure: float) -> None:
    assert objective({"rebuilt": records.measured(20.0)}, key) == figure


def test_optuna_looks_for_the_lowest_loss(tokens: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = sweep(
        tokens, tmp_path / "out", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "evals.stages=[rebuilt]"
    )
    arguments += [
        "hydra.sweeper.n_jobs=1",
        "objective=rebuilt.perplexity.tokens.nll_per_token",
        "hydra.sweeper.sampler.seed=1",
    ]
    result = barber(*arguments, "rebuild.barber.alpha=interval(0.1,1)")
    assert result.code == 0, result
    losses = [
        record["results"]["rebuilt"]["perplexity"]["tokens"]["nll_per_token"]
        for record in records_of(tmp_path / "out").values()
    ]
    best = (tmp_path / "out" / "optimization_results.yaml").read_text()
    assert len(losses) == 4
    assert float(re.search(r"best_value: (\S+)", best)[1]) == min(losses)  # type: ignore[index]


def test_a_search_goes_on_after_a_trial_that_failed_and_keeps_its_study(tokens: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = pytest.importorskip("optuna")
    arguments = sweep(tokens, tmp_path / "out", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6")
    arguments += [
        "hydra.sweeper.n_jobs=1",
        "objective=rebuilt.perplexity.tokens.nll_per_token",
        "hydra.sweeper.sampler.seed=1",
        "hydra.sweeper.study_name=search",
        f"hydra.sweeper.storage='sqlite:///{tmp_path / 'study.db'}'",
    ]
    result = barber(*arguments, "pattern.sparsity=choice(0.5,1.5)")
    assert result.code == 1 and "Traceback" not in result.err, result
    well, failed = re.search(r"(\d) done, 0 skipped, (\d) failed;|$", result.out).groups()  # type: ignore[union-attr]
    assert (int(well) + int(failed), "0" in well + failed) == (6, False), result.out
    assert "best_value: " in (tmp_path / "out" / "optimization_results.yaml").read_text()
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [trial.state.name for trial in study.trials].count("COMPLETE") == int(well)


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_a_figure_that_is_none_is_left_out_of_the_search(figure: float, caplog: pytest.LogCaptureFixture) -> None:
    results = records.measured(20.0)
    assert results.agreement is not None
    text = dataclasses.replace(results.agreement["text"], kl_divergence=figure)
    changed = {"rebuilt": dataclasses.replace(results, agreement={"text": text})}
    assert objective(changed, "rebuilt.agreement.text.kl_divergence") is None
    assert f"is {figure}; the search goes on without it" in caplog.text


def test_a_search_without_a_figure_ends_in_a_sentence(tokens: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = sweep(tokens, tmp_path / "out", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2")
    result = barber(*arguments, "rebuild.barber.alpha=interval(0.1,1)", "pattern.sparsity=2")
    assert result.code == 1
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("barber: the sweep has ended early: ")
    assert "0 done, 0 skipped, 1 failed" in result.out or "0 done, 0 skipped, 2 failed" in result.out


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def test_every_job_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    here = ["GPU-a", "GPU-b"]
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=here[index]))
    with sweeps.free_gpu() as first, sweeps.free_gpu() as second:
        assert (first, second) == ("cuda:0", "cuda:1")
    with sweeps.free_gpu() as first:
        here.reverse()  # as a process sees them that numbers them otherwise
        with sweeps.free_gpu() as second:
            assert (first, second) == ("cuda:0", "cuda:0")


def test_without_a_gpu_there_is_none_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with sweeps.free_gpu() as device:
        assert device is None
