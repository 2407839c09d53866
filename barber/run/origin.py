"""Where a pruned model comes from, as the hub wants to know it: the repository it was made of, and its licence."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from barber.model.gguf import Packaged
from barber.model.names import hub_id
from barber.model.sources import ModelSource, Pretrained

_LICENCE = ("license", "license_name", "license_link")
_FRONT_MATTER = re.compile(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)


def origin_of(source: ModelSource) -> dict[str, Any]:
    """The keys of a model card's front matter that are known: `base_model`, `license` and what goes with that."""
    match source:
        case Packaged():
            found: dict[str, Any] = {"base_model": source.base_model, "license": source.license}
        case Pretrained():
            found = {"base_model": _repository(source)} | _licence(_card_of(source))
        case _:
            found = {}
    return {key: value for key, value in found.items() if value}


def _repository(source: Pretrained) -> str | None:
    """The repository's id; that of a folder as its config has it, if that is none of a folder."""
    if not source.local or hub_id(source.path):
        return hub_id(source.path)
    with suppress(OSError, ValueError, RecursionError):
        said = json.loads((Path(source.path) / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
        return hub_id(said) if isinstance(said, str) and "/" in said else None
    return None


def _card_of(source: Pretrained) -> dict[str, Any]:
    """The front matter of the model's own card, where that is on this machine."""
    # Whatever somebody wrote there, and ids that are none.
    with suppress(OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        file: Any = Path(source.path) / "README.md"
        if not file.parent.is_dir():
            file = try_to_load_from_cache(source.path, "README.md", revision=source.revision)
        front = _FRONT_MATTER.match(Path(file).read_text(encoding="utf-8-sig"))
        known = yaml.safe_load(front[1]) if front else None
        return known if isinstance(known, dict) else {}
    return {}


def _licence(card: dict[str, Any]) -> dict[str, Any]:
    """What a card says of its licence, which goes on to hold."""
    return {key: card[key] for key in _LICENCE if isinstance(card.get(key), str)}
