"""Write the table of model families in families.md: `python docs/families.py`."""

import re
from importlib import import_module
from pathlib import Path

from barber.model.families import Family, supported

BEGIN, END = "<!-- families -->", "<!-- /families -->"
SHORT = {"query": "q", "key": "k", "value": "v", "output": "o"}


def filled(page: str) -> str:
    """The page with the table as it is now between its two markers."""
    before, _, rest = page.partition(BEGIN)
    return "\n".join([before + BEGIN, "", *rows(), "", END + rest.partition(END)[2]])


def rows() -> list[str]:
    """The table's lines, a family each."""
    found = ["| model type | what it is | blocks | roles |", "|---|---|---|---|"]
    for name in supported():
        module = import_module(f"barber.model.families.{name}")
        what = re.split(r"\.(?: |$)", " ".join(module.__doc__.split()))[0]
        found.append(f"| `{name}` | {what} | {', '.join(module.FAMILY.blocks)} | {roles(module.FAMILY)} |")
    return found


def roles(family: Family) -> str:
    """The roles of a family's linears, block by block, those of a fused one with a plus in between."""
    found = []
    for chain in family.blocks.values():
        inside = [path for path in family.roles if f"{path}.".startswith(tuple(f"{root}." for root in chain))]
        linears = ["+".join(SHORT.get(role, role) for role in family.roles_of(path)) for path in inside]
        turns = ["" if path not in family.interleaved else " by head" for path in inside]
        found.append(", ".join(linear + turn for linear, turn in zip(linears, turns, strict=True)))
    return "; ".join(found)


if __name__ == "__main__":
    path = Path(__file__).with_name("families.md")
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
