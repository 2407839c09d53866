"""`barber --help` and the configs that it lists: every one of them composes, and builds what it says."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from pydoc import locate
from typing import Any, get_type_hints

import pytest
import yaml

import barber as package
from barber.methods.patterns import Unstructured
from barber.methods.pruners import Magnitude, SparseGPT, Wanda
from barber.model.gguf import Packaged
from barber.run.experiment import Experiment
from tests.cli.running import barber, built

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(
    (file.parent.relative_to(CONF).as_posix(), file.stem)
    for file in CONF.rglob("*.yaml")
    if file.parent != CONF and "hydra" not in file.parts[len(CONF.parts) :]
)

#: What has no default, because only the user can know it.
GIVEN = {
    ("model", "local"): ["model.path=FOLDER"],
    ("model", "hub"): ["model.path=ORGANISATION/NAME"],
    ("pattern", "nofm"): ["pattern.n=1", "pattern.m=4"],
    ("calibration", "text"): ["calibration.path=FILE"],
    ("calibration", "tokens"): ["calibration.path=FILE"],
    ("evals/text", "files"): ["evals.texts.files.path=FILE"],
    ("evals/text", "tokens"): ["evals.texts.tokens.path=FILE"],
    ("evals/text", "hub"): ["evals.texts.hub.dataset=ORGANISATION/NAME"],
    ("calibration", "hub"): ["calibration.dataset=ORGANISATION/NAME"],
}


def test_help_names_every_choice_of_every_group_and_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "barber", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    groups = done.stdout.split("(GROUP=CHOICE)\n")[1].split("Examples")[0]
    listed = dict(line.split(": ") for line in groups.splitlines() if line)
    for group in {group for group, _ in CHOICES}:
        choices = [choice for other, choice in CHOICES if other == group]
        assert listed[group].split(", ") == choices
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "transformers", "matplotlib", "numpy"}


def test_the_composed_config_can_be_looked_at_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = barber("--cfg", "job", "pruner=wanda", "rebuild.barber.alpha=0.3")
    assert shown.code == 0
    config = yaml.safe_load(shown.out)
    assert config["pruner"] == {"_target_": "barber.Wanda"}
    assert config["rebuild"]["barber"]["alpha"] == 0.3
    assert not list(tmp_path.iterdir())


# What names a component; the others choose among these, see test_experiments.
COMPONENTS = [pair for pair in CHOICES if pair[0] not in ("experiment", "method") and "/on_" not in pair[0]]


@pytest.mark.parametrize(("group", "choice"), COMPONENTS)
def test_every_choice_composes_and_builds_what_it_names(group: str, choice: str) -> None:
    experiment = built(f"{group}={choice}", *GIVEN.get((group, choice), []))
    component = component_of(experiment, group, choice)
    node = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text(encoding="utf-8"))
    if choice.startswith("paper_"):  # these are another choice with settings of their own
        node = yaml.safe_load((CONF / group / f"{node['defaults'][0]}.yaml").read_text(encoding="utf-8"))
    if group == "evals" and choice in node:  # the choice adds a kind to what all evals have in common
        node = node[choice] if isinstance(node[choice], dict) else node
    if "_target_" in node:
        target = locate(node["_target_"])
        assert isinstance(component, target if inspect.isclass(target) else get_type_hints(target)["return"])
    else:
        assert component is (True if choice == "perplexity" else None)


def component_of(experiment: Experiment, group: str, choice: str) -> Any:
    """What a choice of a group became."""
    match group, choice:
        case "metric", _:
            return experiment.rebuild["barber"].metric
        case "evals/text", _:
            assert list(experiment.evals.texts) == [choice]
            return experiment.evals.texts[choice]
        case "rebuild" | "update", str() if choice != "none":
            (step,) = getattr(experiment, group).values()
            return step
        case "evals", str() if choice != "none":
            return getattr(experiment.evals, choice)
    return getattr(experiment, group)


def test_configs_name_public_names_only() -> None:
    """The digests of finished jobs hold them, so that no move of a file may change one."""
    texts = [file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml")]
    targets = {target for text in texts for target in re.findall(r"_target_: barber\.(\S+)", text)}
    assert targets - {"cli.KeepFinishedRuns"} <= set(package.__all__)  # Hydra's own, not a part of any digest
    assert all(getattr(package, name).__name__ for name in package.__all__)


def test_models_of_the_hub_are_named_in_full_and_run_no_code_of_their_own() -> None:
    nodes = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in (CONF / "model").glob("*.yaml")]
    named = [node for node in nodes if node["_target_"] == "barber.Pretrained" and node["path"] != "???"]
    assert len(named) == len({node["path"] for node in named}) > 20
    for node in named:
        assert re.fullmatch(r"[\w-]+/[\w.-]+", node["path"])
        assert (node["dtype"], node["revision"], node["trust_remote_code"]) == ("auto", None, False)


@pytest.mark.parametrize(
    ("choice", "pruner", "granularity", "alpha"),
    [
        ("paper_magnitude", Magnitude(), "block", 0.1),
        ("paper_sparsegpt", SparseGPT(), "layer", 0.1),
        ("paper_wanda", Wanda(), "output", 0.01),
    ],
)
def test_an_experiment_has_the_settings_of_the_papers_scripts(
    choice: str,
    pruner: Any,
    granularity: str,
    alpha: float,
) -> None:
    assert ("experiment", choice) in CHOICES
    experiment = built(f"experiment={choice}")
    assert experiment.pruner == pruner
    assert experiment.pattern == Unstructured(0.5)
    assert (experiment.rebuild["barber"].granularity, experiment.rebuild["barber"].alpha) == (granularity, alpha)


def test_the_command_line_has_the_last_word_over_an_experiment() -> None:
    experiment = built("experiment=paper_wanda", "rebuild.barber.alpha=0.2", "pruner=magnitude")
    assert (experiment.rebuild["barber"].alpha, experiment.pruner) == (0.2, Magnitude())
    assert built("experiment=paper_wanda", "rebuild=none").rebuild is None


def test_without_arguments_the_packaged_model_is_pruned_and_measured() -> None:
    experiment = built()
    assert isinstance(experiment.model, Packaged)
    assert experiment.name == "smollm2-135m_unstructured_magnitude_barber"
    assert (experiment.pruner, experiment.pattern) == (Magnitude(), Unstructured(0.5))
    assert experiment.rebuild["barber"].alpha == 0.1
    assert list(experiment.evals.stages) == ["dense", "pruned", "rebuilt"]
    assert experiment.tracker is None
