"""How much of a run's training is done, and how long the rest will take."""

from __future__ import annotations

from swamp_fast.common.format import duration
from swamp_fast.common.timing import Stopwatch
from swamp_fast.runs.console import Console

FIRST_ESTIMATE_SECONDS = 1.5  # of training, before the first estimate of the time left is printed


class TimeLeft:
    """Estimates how long the rest takes at the pace since `start`, and prints its first estimate once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._watch: Stopwatch | None = None
        self._is_printed = False

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._watch is not None

    def start(self) -> None:
        """Begin to measure the pace; further calls change nothing."""
        if self._watch is None:
            self._watch = Stopwatch()

    def estimate(self, steps_done: int, steps_left: int) -> str:
        """The time that `steps_left` take if `steps_done` took the time since `start`, in words."""
        seconds = self._watch.seconds if self._watch is not None else 0.0
        left = duration(seconds / max(steps_done, 1) * steps_left)
        if not self._is_printed and seconds > FIRST_ESTIMATE_SECONDS:
            self._is_printed = True
            self.console.line(f"time     about {left} left at this pace")
        return left


class Progress:
    """Counts the training steps of all particles, and shows the time left at the pace so far.

    steps_done  in this process; the first step, which warms up, is not counted
    steps_left  until the run is complete
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.steps_done = self.steps_left = 0
        self._time_left = TimeLeft(console)

    def step(self, particles: int, where: str) -> None:
        """Count one training step of `particles` particles; `where` says which, for the console's status line."""
        self.steps_left -= particles
        if not self._time_left.started:
            self._time_left.start()
            return
        self.steps_done += particles
        self.console.status(f"{where}, {self._time_left.estimate(self.steps_done, self.steps_left)} left")
