"""What models are called where the choice of one, `local` or `hub`, says only where it is."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACES = ("local", "hub")
"""Choices of `model` that name no model."""

_SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/[^/]+/?$")


def own_name(path: str) -> str:
    """The name of a folder or repository; in the hub's cache, whose folders are called after commits, the latter."""
    if cached := _SNAPSHOT.search(path):
        return cached[2]
    name = Path(path).name
    return name if name not in ("", "..") else Path(path).resolve().name


def hub_id(path: str) -> str | None:
    """The repository on the hub that a path or an id means, if any; a folder of the hub's cache is that of its own."""
    if cached := _SNAPSHOT.search(path):
        return f"{cached[1]}/{cached[2]}"
    is_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path) and not Path(path).exists()
    return path if is_one else None


def called(choice: str | None, model: Mapping[str, Any] | None) -> str | None:
    """What a model is called.

    Args:
        choice: of the config group.
        model: its config.
    """
    path = (model or {}).get("path")
    return own_name(str(path)) if choice in PLACES and path else choice
