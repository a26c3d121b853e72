"""The stopwatch, on a clock that the test sets."""

from __future__ import annotations

import pytest
import torch

from swamp_fast.common import timing
from swamp_fast.common.timing import Stopwatch, seconds_in_turn, seconds_of

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_a_pause_does_not_count(clock):
    watch = Stopwatch(seconds=5)
    clock.passes(1)
    assert watch.seconds == 6
    watch.pause()
    clock.passes(10)
    watch.pause()
    assert watch.seconds == 6
    watch.resume()
    clock.passes(2)
    watch.resume()
    assert watch.seconds == 8


def test_calls_are_timed_in_turn_and_summarised(clock):
    made = []

    def call(name: str, seconds: list[float]):
        remaining = iter(seconds)

        def timed() -> None:
            made.append(name)
            clock.passes(next(remaining))

        return timed

    calls = [call("a", [1, 3, 2]), call("b", [6, 4, 9])]
    assert seconds_in_turn(calls, CPU, 3) == [[1, 3, 2], [6, 4, 9]]
    assert made == ["a", "b"] * 3
    assert seconds_of(call("d", [7]), CPU) == 7


def test_no_round_begins_after_the_limit(clock):
    made = []

    def call() -> None:
        made.append(None)
        clock.passes(2)

    assert seconds_in_turn([call], CPU, 10, limit=3) == [[2, 2]]
    assert len(made) == 2
    assert seconds_in_turn([call], CPU, 10, limit=0.0) == [[2]]  # the first round is always completed
    assert len(made) == 3
