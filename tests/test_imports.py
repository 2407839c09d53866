"""What is imported is declared, and the core needs no more than torch, transformers and safetensors."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OURS = {"barber", "experiments"}
# In the builds of torch for GPUs; where it is not there, nothing asks for it.
PART_OF_TORCH = {"triton"}


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def named(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(line).name) for line in requirements}


def imported(file: Path, at_once: bool) -> Iterator[str]:
    """The modules of others that a file imports; with `at_once` only those that it does not leave to its functions."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module
        elif not (at_once and isinstance(node, ast.FunctionDef)):
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    tops = {module.partition(".")[0] for module in visit(ast.parse(file.read_text(encoding="utf-8")))}
    yield from tops - OURS - PART_OF_TORCH - sys.stdlib_module_names


def undeclared(folder: str, declared: set[str], at_once: bool) -> set[str]:
    distributions = packages_distributions()
    return {
        f"{file.relative_to(ROOT)}: {module}"
        for file in (ROOT / folder).rglob("*.py")
        for module in imported(file, at_once)
        if not declared & {canonical(name) for name in distributions.get(module, [module])}
    }


def test_what_is_imported_at_once_is_a_dependency() -> None:
    assert undeclared("barber", named(project()["dependencies"]), at_once=True) == set()


@pytest.mark.parametrize("folder", sorted(OURS))
def test_what_is_imported_when_it_is_needed_is_a_dependency_or_in_an_extra(folder: str) -> None:
    extras = project()["optional-dependencies"]
    del extras["dev"]
    declared = named(project()["dependencies"]).union(*map(named, extras.values()))
    assert undeclared(folder, declared, at_once=False) == set()


def test_every_dependency_has_a_lower_bound_and_a_tested_version() -> None:
    tested = named([line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "#"])
    for line in project()["dependencies"]:
        requirement = Requirement(line)
        assert any(bound.operator == ">=" for bound in requirement.specifier), line
        assert canonical(requirement.name) in tested | {"torch"}, line


# The core


def with_what_it_needs(*distributions: str) -> set[str]:
    """These distributions and all that they cannot do without."""
    found: set[str] = set()
    waiting = list(distributions)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # it is not for this platform
            continue
        found.add(name)
        needed = [Requirement(line) for line in lines]
        waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


CORE = """
import json, sys
from importlib.machinery import PathFinder
from pathlib import Path

hidden = set(json.loads(sys.argv[1]))

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from barber.api import prune
from barber.methods.patterns import NM
from barber.methods.pruners import Wanda
from barber.methods.rebuild import Barber
from barber.model.checkpoint import Checkpoint
from barber.model.stream import Streamed, opened
from barber.walk.pruning import Pruning

assert not hidden & {name.partition(".")[0] for name in sys.modules}
folder = Path(sys.argv[2])
config = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config).eval()
model.save_pretrained(folder)
tokens = torch.randint(96, (4, 16))
how = {"pattern": NM(2, 4), "pruner": Wanda(), "rebuild": Barber(alpha=0.1), "batch_size": 2}
print(prune(model, tokens, **how).sparsity)
hollow, files = opened(config, folder, torch.float32)
checkpoint = Checkpoint(folder, 2)
streamed = Streamed(hollow, files, checkpoint)
pruning = Pruning(NM(2, 4), Wanda(), [Barber(alpha=0.1)], torch.device("cpu"), batch_size=2)
print(pruning.carry_out(hollow, tokens, streamed, checkpoint).sparsity)
state = model.state_dict()
print(all(torch.equal(tensor, state[name]) for name, tensor in streamed.state()))
"""


def test_the_core_runs_with_torch_transformers_and_safetensors_alone(tmp_path: Path) -> None:
    """In memory and streamed, where nothing else can be imported but what these three need themselves."""
    needed = with_what_it_needs("torch", "transformers", "safetensors")
    hidden = [
        module
        for module, names in packages_distributions().items()
        if module not in sys.stdlib_module_names and not needed & {canonical(name) for name in names}
    ]
    assert {"accelerate", "datasets", "hydra", "matplotlib", "omegaconf", "pyarrow", "scipy"} <= set(hidden)
    command = [sys.executable, "-c", CORE, json.dumps([name for name in hidden if name not in OURS]), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.5", "0.5", "True"]
