"""The Hugging Face hub, or the lack of it: without a network its libraries retry for most of a minute."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session

log = logging.getLogger("barber")

_TIMEOUT_SECONDS = 5.0
_REMEMBERED_SECONDS = 60.0
_last: tuple[float, bool] | None = None


def reachable() -> bool:
    """Whether the hub answers; an answer of the last minute is good enough."""
    global _last
    if constants.is_offline_mode():
        return False
    if _last is None or time.monotonic() - _last[0] > _REMEMBERED_SECONDS:
        try:
            get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
            answers = True
        except Exception as error:  # whatever the HTTP library of the day raises
            log.debug("The hub cannot be reached: %s", error)
            answers = False
        _last = time.monotonic(), answers
    return _last[1]


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Where the hub does not answer, its libraries only look into their caches inside this context, at once."""
    if reachable():
        yield
        return
    places = [(constants, "HF_HUB_OFFLINE")]
    if "datasets" in sys.modules:
        places.append((sys.modules["datasets"].config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
