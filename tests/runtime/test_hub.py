"""Without a network nobody waits: the hub is asked seldom, and its libraries keep to their caches meanwhile."""

from contextlib import suppress

import datasets
import pytest
from huggingface_hub import constants

from barber.runtime import hub


class Network:
    """What stands for the hub and for the clock: a session that counts its requests."""

    def __init__(self) -> None:
        self.up = True
        self.requests: list[str] = []
        self.now = 1000.0

    def head(self, address: str, timeout: float) -> None:
        assert 0 < timeout <= 10
        self.requests.append(address)
        if not self.up:
            raise OSError("no route to host")

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """A network on a machine that is not in offline mode and has asked nothing yet."""
    made = Network()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_last", None)
    monkeypatch.setattr(hub, "get_session", lambda: made)
    monkeypatch.setattr(hub, "time", made)
    return made


def offline() -> tuple[bool, bool]:
    """Whether the hub's own library and that of data sets are in offline mode."""
    return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError, TimeoutError])
def test_whatever_goes_wrong_means_unreachable(
    network: Network, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error("no session")

    monkeypatch.setattr(hub, "get_session", fail)
    assert not hub.reachable()


@pytest.mark.parametrize("up", [True, False])
def test_the_hub_is_asked_at_most_once_a_minute_and_a_change_is_noticed_then(network: Network, up: bool) -> None:
    network.up = up
    assert hub.reachable() == up
    assert network.requests == [constants.ENDPOINT]
    network.up = not up
    for _ in range(59):
        assert hub.reachable() == up
        network.now += 1
    assert len(network.requests) == 1
    network.now += 2
    assert hub.reachable() != up
    assert len(network.requests) == 2


def test_offline_mode_asks_nothing_whatever_was_answered_before(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    network.now += 3600
    assert not hub.reachable()
    assert len(network.requests) == 1


@pytest.mark.parametrize("up", [True, False])
def test_an_unreachable_hub_means_offline_mode_inside_and_only_there(network: Network, up: bool) -> None:
    """One context inside another ends for itself."""
    network.up = up
    inside = (not up, not up)
    with hub.offline_if_unreachable():
        with hub.offline_if_unreachable():
            assert offline() == inside
            assert constants.is_offline_mode() != up
        assert offline() == inside
    assert offline() == (False, False)
    assert len(network.requests) == 1


@pytest.mark.parametrize("up", [True, False])
def test_an_error_inside_comes_out_and_leaves_all_as_it_was(network: Network, up: bool) -> None:
    network.up = up
    with pytest.raises(KeyError, match="inside"), hub.offline_if_unreachable():
        raise KeyError("inside")
    assert offline() == (False, False)
    with suppress(KeyboardInterrupt), hub.offline_if_unreachable():
        raise KeyboardInterrupt
    assert offline() == (False, False)


def test_the_offline_mode_of_the_user_stays(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with hub.offline_if_unreachable():
        assert offline() == (True, True)
    assert offline() == (True, True)
    assert not network.requests
