"""How much of a run's training is done, and how long the rest will take."""

from __future__ import annotations

import time

from swamp_fast.common.format import duration
from swamp_fast.runs.console import Console

FIRST_ESTIMATE_SECONDS = 1.5  # of training, before the first estimate of the time left is printed


class Progress:
    """Counts the training steps of all particles, and shows the time left at the pace so far.

    steps_done  in this process; the first step, which warms up, is not counted
    steps_left  until the run is complete
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.steps_done = self.steps_left = 0
        self._began: float | None = None
        self._estimate_printed = False

    def step(self, particles: int, where: str) -> None:
        """Count one training step of `particles` particles; `where` says which, for the console's status line."""
        now = time.perf_counter()
        self.steps_left -= particles
        if self._began is None:
            self._began = now
            return
        self.steps_done += particles
        seconds_left = (now - self._began) / self.steps_done * self.steps_left
        if not self._estimate_printed and now - self._began > FIRST_ESTIMATE_SECONDS:
            self._estimate_printed = True
            self.console.line(f"time     about {duration(seconds_left)} left at this pace")
        self.console.status(f"{where}, {duration(seconds_left)} left")
