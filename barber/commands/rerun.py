"""barber rerun RECORD [KEY=VALUE ...]: the run of a record once more, with its config as it was resolved then.

RECORD is a run folder or its record.json. What stands in the record is held to the same checks as any config file.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from barber.errors import UserError
from barber.run.reading import read
from barber.run.record import RunRecord, package_versions
from barber.targets import KEY

_NAME = "rerun"


def as_run(arguments: list[str], folder: Path) -> list[str]:
    """The command line of the run, whose config is written to `folder`; says which versions are others now.

    Raises:
        UserError: there is no such record.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        raise UserError("barber rerun RECORD [KEY=VALUE ...] takes a run folder or its record.json")
    record = read(Path(arguments[0]))
    for package, then, now in changed(record):
        print(f"{package}: {then} then, {now} now")
    (folder / f"{_NAME}.yaml").write_text(_config(record), encoding="utf-8")
    return ["--config-dir", str(folder), "--config-name", _NAME, *arguments[1:]]


def changed(record: RunRecord) -> list[tuple[str, str, str]]:
    """The packages whose versions are not what they were: name, then, now."""
    now = package_versions()
    return [
        (package, then, now.get(package, "not installed"))
        for package, then in record.versions.items()
        if now.get(package) != then
    ]


def _config(record: RunRecord) -> str:
    """A whole config, with Hydra's part as ours has it."""
    hydra = yaml.safe_load(files("barber.conf").joinpath("config.yaml").read_text(encoding="utf-8"))["hydra"]
    # Of the record, nothing is an interpolation any more, and nothing is allowed: that is for the command line.
    own = json.loads(json.dumps({name: value for name, value in record.config.items() if name != KEY}))
    overriding = [{f"override hydra/{part}": "barber"} for part in ("help", "job_logging", "hydra_logging")]
    whole: dict[str, Any] = {
        "defaults": ["_self_", *overriding],
        KEY: [],
        **_literal(own),
        "hydra": {**hydra, "runtime": {"choices": record.choices}},
    }
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)


def _literal(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _literal(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_literal(value) for value in node]
    return node.replace("${", "\\${") if isinstance(node, str) else node
