"""Nothing in the package is longer than a reader takes in."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "barber"
MOST = {ast.ClassDef: 200, ast.FunctionDef: 50}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_files_classes_and_functions_fit(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, tuple(MOST)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST[type(node)], f"{node.name} has {lines} lines"


def test_the_readme_fits_a_reader() -> None:
    assert len((PACKAGE.parent / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
