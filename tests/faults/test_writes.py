"""Whenever a process is killed, or the disk refuses a call that writes: the same command comes to the same bits."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.campaign import Check, carry_out, ended_as_told, said_in_a_sentence, spread
from tests.faults.conftest import KINDS
from tests.faults.injecting import Fault

#: At every so manieth call, so that a campaign has some twenty faults.
EVERY = {"model": 4, "masks": 5, "streamed": 7, "measured and cached": 7, "sweep": 9, "allocation": 11}

#: Carries out a command of a kind with the faults that there are for a number of calls.
Campaign = Callable[[str, Callable[[int], list[Fault]], Check], None]


@pytest.fixture
def campaign(
    command: Callable[[str], list[str]],
    whole: Callable[[str], tuple[Path, int]],
    cache: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> Campaign:
    def of_kind(kind: str, faults_of: Callable[[int], list[Fault]], check: Check) -> None:
        expected, num_calls = whole(kind)
        counts = carry_out(command(kind), faults_of(num_calls), tmp_path, expected, check, cache)
        record_property(f"met at {num_calls} calls, the same bits afterwards:", str(counts))
        assert not counts.wrong, "\n".join(counts.wrong)

    return of_kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_a_call_that_writes_costs_nothing_but_time(kind: str, campaign: Campaign) -> None:
    campaign(kind, lambda calls: spread(calls, ("kill", "term", "kill", "int"), EVERY[kind]), ended_as_told)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_any_moment_costs_nothing_but_time(kind: str, campaign: Campaign) -> None:
    chance = random.Random(kind)

    def faults_of(_: int) -> list[Fault]:
        signals = ("kill", "term", "int") * 3
        return [Fault(-1, signal, after=chance.uniform(0.1, 2.5)) for signal in signals]

    campaign(kind, faults_of, ended_as_told)


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_fails_ends_in_a_sentence_and_the_same_command_goes_on(kind: str, campaign: Campaign) -> None:
    def faults_of(calls: int) -> list[Fault]:
        once = spread(calls, ("full", "broken", "denied"), EVERY[kind], begin=1)
        return once + spread(calls, ("full",), 5 * EVERY[kind], begin=2, stays=True)

    campaign(kind, faults_of, partial(said_in_a_sentence, most=2 if kind == "sweep" else 1))
