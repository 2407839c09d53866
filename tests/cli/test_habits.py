"""What people type who come from other tools: understood, or answered with the command that works."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from barber.commands import ls
from barber.runtime.seals import KEY, sealed
from tests.cli.running import barber, complaint, done, record_of

FORM = "an override is KEY=VALUE or GROUP=CHOICE, without blanks around ="
TRANSCRIPT = {
    "model=org/name": (
        "model=org/name: no such choice; say model=hub model.path=org/name, or a choice of barber ls models"
    ),
    "model=./mine": "model=./mine: no such choice; say model=local model.path=./mine, or a choice of barber ls models",
    "model=folder": "model=folder: no such choice; say model=local model.path=folder, or a choice of barber ls models",
    "model.path=folder": (
        "model.path goes with a folder, model=local model.path=FOLDER, or the hub, model=hub model.path=NAME"
    ),
    "model_name_or_path=facebook/opt-125m": (
        "model_name_or_path: no such key; say model=hub model.path=facebook/opt-125m"
    ),
    "pretrained=folder": "pretrained: no such key; say model=local model.path=folder",
    "model=Llama2-7B": "model=Llama2-7B: no such choice, did you mean model=llama2-7b? ... lists them)",
    "nsamples=128": "nsamples: no such key; say calibration.nsamples=128",
    "seq_len=2048": "seq_len: no such key; say calibration.seqlen=2048",
    "alpha=0.1": "alpha: no such key; say rebuild.barber.alpha=0.1",
    "dtype=bfloat16": "dtype: no such key; say model.dtype=bfloat16",
    "output_dir=out": "output_dir: no such key; say export=hf hydra.run.dir=out",
    "save_dir=out": "save_dir: no such key; say export=hf hydra.run.dir=out",
    "sparsity=0.6": "sparsity: no such key; say pattern.sparsity=0.6",
    "sparsity_ratio=0.6": "sparsity_ratio: no such key; say pattern.sparsity=0.6",
    "sparsity_type=2:4": "sparsity_type: no such key; say pattern=2of4",
    "prune_method=wanda": "prune_method: no such key; say method=wanda",
    "dataset=c4": "dataset: no such key; say calibration=c4",
    "percdamp=0.01": "percdamp: no such key; say pruner.damping=0.01",
    "tasks=[boolq]": "tasks: no such key; say evals.zero_shot.tasks=[boolq]",
    "bs=4": "bs: no such key; say batch_size=4",
    "gpu=0": "gpu: no such key; say device=0",
    "pruner=Wanda": "pruner=Wanda: no such choice, did you mean pruner=wanda? ...",
    "list": f"cannot read 'list': {FORM}; say barber ls",
    "help": f"cannot read 'help': {FORM}; say barber --help",
    "prune": f"cannot read 'prune': {FORM}; say barber model=tiny method=wanda",
    "evaluate": f"cannot read 'evaluate': {FORM}; say barber method=dense",
    "wanda": f"cannot read 'wanda': {FORM}, did you mean method=wanda?",
    "Ria": f"cannot read 'Ria': {FORM}, did you mean method=ria?",
    "folder": f"cannot read 'folder': {FORM}; a model's folder is model=local model.path=folder",
    "x": f"cannot read 'x': {FORM}; a value with special characters needs quotes: \"KEY='VALUE'\"",
    "--model tiny": "--model: no such flag; settings have no dashes: barber model=tiny",
    "--model=tiny": "--model=tiny: no such flag; settings have no dashes: barber model=tiny",
    "--nsamples 12": "--nsamples: no such flag; settings have no dashes: barber calibration.nsamples=12",
    "--sparsity-ratio=0.5": "--sparsity-ratio=0.5: no such flag; settings have no dashes: barber pattern.sparsity=0.5",
    "-v": "-v: no such flag; say barber hydra.verbose=true",
    "--list": "--list: no such flag; say barber ls",
    "--config mine.yaml": (
        "--config: no such flag; say barber --config-dir FOLDER experiment=NAME, for FOLDER/experiment/NAME.yaml"
    ),
    "--dry-run": "--dry-run: no such flag; say barber --cfg job",
    "--multirn": "--multirn: no such flag, did you mean --multirun?",
    "experiment=numbers --config-dir conf": "pattern must be a choice, as 2of4; YAML reads 2:4 as the number 124",
    "experiment=defaults --config-dir conf": (
        "a choice in a config's defaults must be a text: YAML reads 2:4 as the number 124, say 2of4"
    ),
    "ls modles": "barber ls modles: no such kind, did you mean models?",
    "rerun": "barber rerun RECORD [KEY=VALUE ...] takes a run folder or its record.json",
    "rerun nowhere": "nowhere must be the folder of a run, with a record.json: ...",
    "diff nowhere elsewhere": "nowhere must be the folder of a run, or TABLE.jsonl.gz#NAME",
    "doctor now": "barber doctor takes nothing, not now",
}


@pytest.fixture(autouse=True)
def _a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    experiments = tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    (experiments / "numbers.yaml").write_text("# @package _global_\npattern: 2:4\n")
    (experiments / "defaults.yaml").write_text("# @package _global_\ndefaults:\n- override /pattern: 2:4\n")
    (tmp_path / "text.md").write_text("A sentence of some words. " * 200, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("command", "sentence"), TRANSCRIPT.items(), ids=TRANSCRIPT)
def test_what_is_not_understood_is_answered_with_what_works(command: str, sentence: str) -> None:
    said = complaint(barber(*command.split()))
    begin, _, end = sentence.partition("...")
    assert said.startswith(begin) and said.endswith(end) and ("..." in sentence or said == sentence), said


TINY = ["model=tiny", "calibration=text", "calibration.path=text.md", "calibration.nsamples=2", "calibration.seqlen=16"]


@pytest.mark.parametrize("arguments", [["pattern=2:4"], ["--cfg", "job", "pattern=2:4"]], ids=["before", "after"])
def test_patterns_may_be_written_as_people_do_and_flags_may_stand_anywhere(arguments: list[str]) -> None:
    config = yaml.safe_load(done("model=tiny", *arguments, *([] if "--cfg" in arguments else ["--cfg", "job"])))
    assert (config["pattern"]["n"], config["pattern"]["m"]) == (2, 4)


def test_a_sweep_takes_patterns_and_overrides_after_its_flag() -> None:
    said = done(*TINY, "--multirun", "evals=none", "export=none", "pattern=2:4,4:8", "hydra.sweep.dir=out")
    assert "2 done, 0 skipped, 0 failed" in said
    found = {record_of(path.parent)["config"]["pattern"]["m"] for path in Path("out").glob("*/record.json")}
    assert found == {4, 8}


def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint(barber("-m", *TINY, "hydra/launcher=nowhere")).startswith("hydra/launcher=nowhere: no such choice")
    monkeypatch.setattr("barber.complaints._OF_SWEEPS", ("nowhere",))
    sentence = complaint(barber("-m", *TINY, "hydra/launcher=nowhere"))
    assert sentence == 'hydra/launcher=nowhere needs the extra: pip install "llm-barber[sweeps]"'


@pytest.mark.parametrize("kind", ls.KINDS)
def test_ls_tells_what_everything_is(kind: str) -> None:
    said = done("ls", kind)
    for name, what in ls.found(kind):
        assert name in said and len(what) > 3, (name, what)


def test_ls_says_what_it_can_list() -> None:
    assert all(f"barber ls {kind}" in done("ls") for kind in ls.KINDS)


def test_the_version_is_ours() -> None:
    assert done("--version").startswith(f"barber {version('llm-barber')} (Hydra ")


def test_the_doctor_says_what_a_run_finds() -> None:
    said = done("doctor")
    for part in ("torch", "device", "hub", "extra zero-shot", "disk of BARBER_CACHE"):
        assert part in said


def test_a_record_runs_once_more_with_its_config() -> None:
    done(*TINY, "evals=none", "pattern=2of4", "pruner=wanda", "seed=3", "hydra.run.dir=first")
    done("rerun", "first", "hydra.run.dir=second")
    first, second = record_of(Path("first")), record_of(Path("second"))
    for key in ("digest", "config", "choices", "linears", "calibration"):
        assert first[key] == second[key], key
    assert "settings that differ\n  none" in done("diff", "first", "second")


def test_a_record_allows_nothing_that_it_names() -> None:
    done(*TINY, "evals=none", "export=none", "hydra.run.dir=first")
    content = Path("first/record.json").read_text(encoding="utf-8")
    theirs = json.loads(content.replace("barber.Magnitude", "os.getcwd"))
    del theirs[KEY]
    theirs["config"]["allow_targets"] = ["os.*"]
    Path("theirs.json").write_text(json.dumps(sealed(theirs)), encoding="utf-8")
    sentence = complaint(barber("rerun", "theirs.json", "hydra.run.dir=second"))
    assert sentence.startswith("pruner._target_ must be a public name of barber, os.getcwd is none")


def test_a_reader_that_has_gone_is_no_mistake() -> None:
    command = [sys.executable, "-m", "barber", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
