"""Whatever is damaged of what a killed run has left: the same command comes to the same bits, or says what is wrong."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.damage import DAMAGES
from tests.faults.campaign import Counts, differing
from tests.faults.injecting import Fault, attempt


def types_of(folder: Path) -> list[Path]:
    """One file of each type below a folder, in it: those whose names differ in numbers are of one."""
    every = (file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    # what Hydra writes anew, and nobody reads
    found = sorted(file.relative_to(folder) for file in every if file.parent.name != ".hydra")
    return list({re.sub(r"\d+|[0-9a-f]{16,}", "N", str(file)): file for file in found}.values())


@pytest.mark.parametrize("kind", ["model", "streamed", "masks"])
def test_damage_to_any_file_is_mended_or_told(
    kind: str,
    command: Callable[[str], list[str]],
    whole: Callable[[str], tuple[Path, int]],
    cache: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    expected, num_calls = whole(kind)
    attempt(command(kind), Fault(num_calls * 2 // 3, "kill"), tmp_path / "killed", cache)
    counts, files = Counts(), types_of(tmp_path / "killed" / "run")
    assert any("layer-" in str(file) for file in files)
    for number, (file, damage) in enumerate((file, damage) for file in files for damage in DAMAGES):
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "killed", place)
        DAMAGES[damage](place / "run" / file)
        again = attempt(command(kind), None, place, cache)
        counts.tried += 1
        code, said = (again.result.code, again.result.err) if again.result else (again.code, again.err)
        if code == 0:
            wrong = differing(place / "run", expected)
        else:
            wrong = None if code in (1, 2) and re.fullmatch(r"barber: [^\n]+\n", said) else f"{code}: {said[-500:]}"
        counts.wrong += (f"{file}, {damage}: {wrong}",) if wrong else ()
        shutil.rmtree(place)
    record_property(f"{len(files)} types of files damaged in {len(DAMAGES)} ways, mended or told:", str(counts))
    assert not counts.wrong, "\n".join(counts.wrong)
