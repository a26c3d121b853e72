"""The progress of a sweep on the console: the cycles of its runs, and the time that is left for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swamp_fast.common.format import percent
from swamp_fast.config import SwampConfig
from swamp_fast.particles.schedule import total_particle_epochs
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.console import Console
from swamp_fast.runs.progress import TimeLeft
from swamp_fast.runs.record import Run
from swamp_fast.studies.result import SweptRun


class SweepConsole(Console):
    """The console of the runs of a sweep. It shows none of their lines, and calls `on_step` after a step of any."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        super().__init__(False)
        self.on_step = on_step

    def status(self, text: str) -> None:
        """A run has done a step."""
        self.on_step()


class SweepProgress:
    """Shows what the runs of this process do, and estimates how long the whole sweep will take.

    unopened     run number -> its particle-steps, until it is opened
    records      run number -> the record of a run that was opened
    run_console  the console of every run
    """

    def __init__(self, console: Console, problems: Mapping[int, Problem], runs: Sequence[SweptRun]) -> None:
        self.console, self.runs = console, runs
        self.unopened = {
            number: total_particle_epochs(problem.config) * problem.steps_per_epoch
            for number, problem in problems.items()
        }
        self.records: dict[int, Run] = {}
        self.run_console = SweepConsole(self._step)
        self._time_left = TimeLeft(console)

    def opened(self, number: int, record: Run) -> None:
        """A run begins."""
        self._time_left.start()
        self.unopened.pop(number)
        self.records[number] = record

    def cycle(self, run: SweptRun, config: SwampConfig, row: dict[str, Any]) -> None:
        """A cycle of a run is over."""
        self.console.line(
            f"{run.name}: cycle {row['cycle']}/{config.cycles}, density {percent(row['density'])}, test accuracy "
            f"{percent(row['accuracy'])}; the sweep has about {self.time_left()} left"
        )

    def failed(self, number: int, error: Exception) -> None:
        """A run ended with an error."""
        run = self.runs[number]
        run.error = error
        self.unopened.pop(number, None)
        self.records.pop(number, None)
        self.console.line(f"{run.name} ended: {run.error_text}")

    def time_left(self) -> str:
        """An estimate, in words, for the runs of this process."""
        done = sum(record.progress.steps_done for record in self.records.values())
        left = sum(self.unopened.values()) + sum(max(0, record.progress.steps_left) for record in self.records.values())
        return self._time_left.estimate(done, left)

    def _step(self) -> None:
        left = self.time_left()
        over = sum(run.over for run in self.runs)
        self.console.status(f"{over} of {len(self.runs)} runs are over, about {left} left")
