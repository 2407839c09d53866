"""Two thousand commands of nonsense: each ends well or in one sentence, and none in a traceback or never."""

import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.running import Result, barber, write_inputs

NUM_COMMANDS, NUM_PARTS = 2000, 20
CONF = Path(__file__).parents[2] / "conf"
TEXT = ["model=tiny", "calibration=text", "calibration.path=text.md", "calibration.nsamples=4", "calibration.seqlen=64"]
TOKENS = ["model=local", "model.path=model", "calibration=tokens", "calibration.path=tokens.safetensors"]
MEASURED = ["evals/text=files", "evals.texts.files.path=text.md", "evals.seqlen=64", "evals.max_windows=2"]
BASES = [
    [*TEXT, "evals=none"],
    [*TEXT, "evals=none", "export=none", "pattern=2of4", "pruner=wanda", "rebuild=[barber,swaps]"],
    [*TEXT, *MEASURED, "evals=[perplexity,agreement]", "export=masks"],
    [*TOKENS, "evals=none", "allocation=evopress", "allocation.generations=1", "update=[admm,least_squares]"],
    [*TOKENS, "evals=none", "engine.streaming=true", "pruner=sparsegpt", "update=reconstruct"],
]
NUMBERS = [-1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**63, 2**64, 10**18, 10**30, 0.5, -0.0, 1e-300, 1e308, 1e400]
WORDS = [
    "nan",
    "inf",
    "-inf",
    "true",
    "null",
    "???",
    "~",
    "''",
    "' '",
    "'[/x]'",
    "'[x]'",
    "'a=b'",
    "'%s'",
    "'{'",
    "\\",
    "é",
]
WORDS += ["auto", "text.md", "model", "tokens.safetensors", "nowhere", "../x", "'\\n'", "x" * 5000, "!!python/name:a"]
NESTED = ["[]", "[1]", "[a,b]", "[[]]", "{}", "{a:1}", "[null]", "{a:{b:[1,{c:2}]}}", "[", "]", "${", "${seed}", "${a}"]
NESTED += [
    "${oc.env:HOME}",
    "${.}",
    "${now:}",
    "barber.Wanda",
    "os.getcwd",
    "1,2",
    "range(1,3)",
    "choice(a,b)",
    "glob(*)",
]
VALUES = [*map(str, NUMBERS), *WORDS, *NESTED]
# What many a key takes.
PLAIN = [
    "1",
    "2",
    "4",
    "0.1",
    "0.5",
    "true",
    "false",
    "null",
    "auto",
    "text.md",
    "tokens.safetensors",
    "layer",
    "float32",
]
# Of the hub, of W&B, and what would write elsewhere.
LEFT_ALONE = ("hydra.run.dir", "hydra.sweep.dir", "data_dir", "tracker", "model.trust_remote_code")


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a composed config."""
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")


def choices() -> list[str]:
    """Every choice of every group, but for models of the hub and whole experiments."""
    files = [path.relative_to(CONF) for path in CONF.rglob("*.yaml") if len(path.relative_to(CONF).parts) > 1]
    groups = [(file.parent.as_posix(), file.stem) for file in files]
    left = ("model", "experiment", "tracker", "hydra", "method", "rebuild/on_model", "rebuild/on_pattern")
    return [f"{group}={choice}" for group, choice in groups if group not in left and not group.startswith("hydra/")]


def garbled(text: str, chance: random.Random) -> str:
    """A text with a letter more, less, or elsewhere."""
    at = chance.randrange(len(text))
    return chance.choice(
        [text[:at] + text[at + 1 :], text[:at] + chance.choice("=.[]{},'$+~@:-") + text[at:], text[::-1]]
    )


def override(keys: list[str], groups: list[str], chance: random.Random) -> str:
    """Something to say to `barber`."""
    key = chance.choice([key for key in keys if key.startswith("hydra") == (chance.random() < 0.1)])
    kind = chance.random()
    if kind < 0.3:
        return f"{key}={chance.choice(PLAIN)}"
    if kind < 0.6:
        return f"{chance.choice(['', '', '', '', '+', '++', '~'])}{key}={chance.choice(VALUES)}"
    if kind < 0.9:
        return chance.choice(groups)
    return garbled(chance.choice([*groups, f"{key}={chance.choice(VALUES)}"]), chance)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[str]]:
    """The keys of a base that may be changed, Hydra's as well."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("keys"))
    found = [
        [key for key in leaves(yaml.safe_load(barber(*base, "--cfg", "all").out)) if not key.startswith(LEFT_ALONE)]
        for base in BASES
    ]
    patch.undo()
    return found.__getitem__


def is_sound(result: Result) -> bool:
    """A success without a word, or one sentence that says what is wrong."""
    if "Traceback" in result.out + result.err:
        return False
    if result.code == 0:
        return True
    return result.code in (1, 2) and re.fullmatch(r"(usage: [^\0]*)?barber: [^\n]+\n", result.err) is not None


def too_long(*_: object) -> None:
    raise AssertionError("the command does not come to an end")


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_whatever_is_said_ends_well_or_in_a_sentence(
    part: int,
    keys: Callable[[int], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    chance, groups, wrong = random.Random(part), choices(), []
    signal.signal(signal.SIGALRM, too_long)
    for number in range(NUM_COMMANDS // NUM_PARTS):
        folder = tmp_path / str(number) / "where" / "it" / "runs"
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        write_inputs(folder)
        base = chance.randrange(len(BASES))
        said = [override(keys(base), groups, chance) for _ in range(chance.randint(1, 3))]
        signal.alarm(60)
        result = barber(*BASES[base], "cache=off", "hydra.run.dir=out", "hydra.sweep.dir=sweep", *said)
        signal.alarm(0)
        if not is_sound(result):
            wrong.append(f"{[*BASES[base], *said]} {result.code}\n{result.err[-1500:]}")
    record_property("commands that ended well or in a sentence", f"{NUM_COMMANDS // NUM_PARTS - len(wrong)}")
    assert not wrong, "\n\n".join(wrong)
