"""What makes two runs the same one: which settings count for what, and a digest of those that count."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

Consequence = Literal["figures", "layers", "point"]

_NOTHING: tuple[Consequence, ...] = ()

# Settings that do not count for all there is, by the last part of their key, and what they do count for: the `figures`
# and files of a run, its finished `layers`, the `point` of a table (which has model, texts and seed elsewhere).
_COUNTS_FOR: dict[str, tuple[Consequence, ...]] = {
    # names, places, and who is told
    **dict.fromkeys(
        ("name", "tracker", "resume", "cache", "data_dir", "save", "disk_check", "allow_targets"), _NOTHING
    ),
    # what a model card says of the model
    **dict.fromkeys(("base_model", "license"), _NOTHING),
    # what is done with the pruned model
    "evals": ("figures", "point"),
    "export": ("figures",),
    # what is measured, and how it is computed
    **dict.fromkeys(
        ("batch_size", "placement", "stages", "sample", "texts", "perplexity", "agreement", "zero_shot"),
        ("figures", "layers"),
    ),
    # where model and texts come from, and the seed over which tables take the mean
    **dict.fromkeys(("seed", "local", "path", "file", "package", "install", "files"), ("figures", "layers")),
}

# Keys that were added after configs had been digested, by pattern, and the value with which they change nothing: a
# config that has it there is the same as one without the key. A value stays, also when the default becomes another.
_ADDED: dict[str, Any] = {"skip": []}


def counts(key: str, consequence: Consequence) -> bool:
    """Whether a setting, by its key or the last part of it, counts for something."""
    return consequence in _COUNTS_FOR.get(key.rpartition(".")[2], ("figures", "layers", "point"))


def counting(config: Mapping[str, Any], consequence: Consequence) -> dict[str, Any]:
    """The settings of a resolved config that count for something."""
    return dict(_counting(config, consequence, ""))


def digest_of(config: Mapping[str, Any]) -> str:
    """SHA-256 of the settings that figures depend on: equal for runs that give the same ones."""
    kept = counting(config, "figures")
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _counting(node: Mapping[str, Any], consequence: Consequence, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if counts(key, consequence) and not _changes_nothing(key, value):
            yield name, _part(value, consequence, f"{key}.")


def _part(value: Any, consequence: Consequence, prefix: str) -> Any:
    if isinstance(value, Mapping):
        return dict(_counting(value, consequence, prefix))
    return [_part(item, consequence, prefix) for item in value] if isinstance(value, list) else value


def _changes_nothing(key: str, value: Any) -> bool:
    return any(fnmatchcase(key, pattern) and value == neutral for pattern, neutral in _ADDED.items())
