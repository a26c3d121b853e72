"""Time by a stopwatch: seconds since a moment, and the seconds that calls take on a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch


class Stopwatch:
    """Counts seconds from when it is made, on top of `seconds` counted earlier; the time it is paused doesn't count."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._counted = seconds
        self._running_since: float | None = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        if self._running_since is None:
            return self._counted
        return self._counted + time.perf_counter() - self._running_since

    def restart(self) -> None:
        """Count again from zero."""
        self._counted, self._running_since = 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stop counting until `resume`."""
        self._counted, self._running_since = self.seconds, None

    def resume(self, added: float = 0.0) -> None:
        """Count again from now on; `added` are seconds of the pause that do count."""
        self._counted, self._running_since = self.seconds + added, time.perf_counter()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, including the work that it starts on `device`."""
    _wait_for(device)
    watch = Stopwatch()
    call()
    _wait_for(device)
    return watch.seconds


def seconds_in_turn(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int, limit: float = math.inf
) -> list[list[float]]:
    """The seconds that each call took in each round. Every round makes each call once, in order.

    Because the calls are interleaved, other load on the machine slows all of them alike. The caller warms them up.

    limit  seconds after which no further round begins; the first is always completed
    """
    taken: list[list[float]] = [[] for _ in calls]
    watch = Stopwatch()
    for _ in range(rounds):
        for call, seconds in zip(calls, taken, strict=True):
            seconds.append(seconds_of(call, device))
        if watch.seconds > limit:
            break
    return taken


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
