"""Every experiment of conf/ is one that runs: all its points make an experiment, with the settings that it is about."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import open_dict

import barber
import barber.cli  # which registers the resolvers
from barber.commands import NAMES as SUBCOMMANDS
from barber.config import experiment, resolved
from barber.run.experiment import Experiment
from barber.run.identity import digest_of

CONF = Path(barber.__file__).parents[1] / "conf"
NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SWEEPS = [name for name in NAMES if name.startswith(("table_", "ablation_", "demo_", "frontier"))]
ALL_METHODS = ["dense", "magnitude", "magnitude_barber", "wanda", "wanda_barber"]
ALL_METHODS += ["sparsegpt", "sparsegpt_mask", "sparsegpt_barber"]


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("barber.conf", version_base="1.3"):
        yield


def config_of(*overrides: str) -> tuple[dict[str, Any], Any]:
    """The resolved config and what Hydra is to do with it."""
    config = compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    hydra_config = config.hydra
    with open_dict(config):
        del config["hydra"]
    return resolved(config), hydra_config


def points(name: str, *overrides: str) -> list[list[str]]:
    """The overrides of as many jobs as show every value."""
    _, hydra_config = config_of(f"experiment={name}", *overrides)
    assert str(hydra_config.mode) == "RunMode.MULTIRUN"
    axes = [
        [f"{key}={value}" for value in str(values).split(",")] for key, values in hydra_config.sweeper.params.items()
    ]
    return [[axis[i % len(axis)] for axis in axes] for i in range(max(map(len, axes)))]


def jobs(name: str, *overrides: str, rebuilt: bool = False) -> Iterator[tuple[str, dict[str, Any], Experiment]]:
    """All of them, or those alone whose methods have an initial mask rebuilt."""
    for point in points(name, *overrides):
        if rebuilt and not any("_" in override.partition("=")[2] for override in point):
            continue
        values, _ = config_of(f"experiment={name}", *overrides, *point)
        yield " ".join(point), values, experiment(values)


@pytest.mark.parametrize("name", SWEEPS)
def test_the_points_of_a_sweep_are_experiments_of_their_own(name: str) -> None:
    found = points(name)  # the first, the last and one between: test_every_experiment runs such ones, too
    chosen = [found[0], found[len(found) // 2], found[-1]]
    made = [config_of(f"experiment={name}", *point)[0] for point in chosen]
    assert all(experiment(values) for values in made)
    digests = [digest_of(values) for values in made]
    assert len(set(digests)) == len(set(map(tuple, chosen))) > 1


@pytest.mark.parametrize("name", ["table_unstructured", "table_nm", "table_zero_shot", "demo_table"])
def test_the_paper_s_tables_have_every_method_alone_and_rebuilt(name: str) -> None:
    methods = [word for point in points(name) for word in point if word.startswith("method=")]
    assert set(methods) == {f"method={method}" for method in ALL_METHODS}


# methods.md: the settings of the authors' scripts
@pytest.mark.parametrize(
    ("model", "magnitude", "sparsegpt"),
    [
        ("llama-7b", ("block", 0.1), ("layer", 0.1)),
        ("llama-13b", ("block", 0.1), ("layer", 0.1)),
        ("llama2-7b", ("block", 0.1), ("input", 0.001)),
        ("llama3-8b", ("block", 0.1), ("input", 0.001)),
        ("llama2-13b", ("layer", 0.1), ("layer", 0.1)),
    ],
)
def test_rebuilding_has_the_settings_of_the_scripts_for_the_model(
    model: str, magnitude: tuple[str, float], sparsegpt: tuple[str, float]
) -> None:
    rebuilt = {
        point.partition("=")[2]: (made.rebuild["barber"].granularity, made.rebuild["barber"].alpha)
        for point, _, made in jobs("table_unstructured", f"model={model}", rebuilt=True)
    }
    assert rebuilt == {
        "magnitude_barber": magnitude,
        "wanda_barber": ("output", 0.01),
        "sparsegpt_barber": sparsegpt,
        "sparsegpt_mask": ("output", 0),
    }


def test_n_of_m_is_rebuilt_by_output_rows() -> None:
    for _, _, made in jobs("table_nm", "model=llama2-13b", rebuilt=True):
        assert made.rebuild["barber"].granularity == "output"
        made.rebuild["barber"].check(made.pattern)


@pytest.mark.parametrize("name", [name for name in SWEEPS if name.startswith(("table_", "ablation_"))])
def test_tables_and_ablations_have_the_papers_protocol(name: str) -> None:
    values, _ = config_of(f"experiment={name}")
    assert (values["evals"]["seqlen"], values["evals"]["max_windows"]) == (2048, None)
    assert (values["calibration"]["nsamples"], values["calibration"]["seqlen"]) == (128, 2048)
    assert values["export"] is None or name == "ablation_precision"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SWEEPS and not name.startswith("search_")])
def test_the_others_are_single_runs(name: str) -> None:
    values, hydra_config = config_of(f"experiment={name}")
    assert hydra_config.mode is None
    experiment(values)


def test_a_search_measures_on_validation_text_alone() -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    values, hydra_config = config_of("experiment=search_alpha_granularity")
    assert [text["split"] for text in values["evals"]["texts"].values()] == ["validation"]
    assert values["objective"].split(".")[2] in values["evals"]["texts"]
    assert str(hydra_config.sweeper.direction) == "minimize"
    experiment(values)


# ---------------------------------------------------------------------------------------------------------------------
# What the documents tell people to type

ROOT = CONF.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += sorted((ROOT / "experiments" / "results").rglob("*.md"))


def commands(text: str) -> Iterator[str]:
    """The arguments of runs in blocks of code and in backquotes; not with a flag of Hydra's, as `--help`."""
    text = re.sub(r"\\\n\s*", "", text)
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```|((?:^    .*\n)+)", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in (block[0] or block[1]).splitlines()]
    found = [match[1] for line in lines if (match := re.match(r" *(?:torchrun .* -m )?barber(?: (.*))?$", line))]
    found += [" ".join(code.split()) for code in re.findall(r"`barber ([^`]+)`", text)]
    for arguments in found:
        if arguments and "--" not in arguments and arguments.split()[0] not in SUBCOMMANDS:
            yield arguments.removeprefix("-m ")


@pytest.mark.parametrize(
    "arguments", sorted({each for document in DOCUMENTS for each in commands(document.read_text(encoding="utf-8"))})
)
def test_commands_of_the_documents_are_understood(arguments: str) -> None:
    """Of a sweep the first value, one between and the last."""
    overrides = OverridesParser.create().parse_overrides(shlex.split(arguments))
    values = [
        list(one.sweep_string_iterator()) if one.is_sweep_override() else [one.get_value_string()] for one in overrides
    ]
    longest = max(map(len, values))
    for number in {0, longest // 2, longest - 1}:
        point = [
            f"{one.input_line.partition('=')[0]}={choices[number if number < len(choices) else 0]}"
            for one, choices in zip(overrides, values, strict=True)
        ]
        experiment(config_of(*point)[0])
