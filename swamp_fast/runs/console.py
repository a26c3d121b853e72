"""Prints a run's introduction and one line per cycle on standard error and, on a terminal, a status line below them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from swamp_fast.common.format import duration, percent
from swamp_fast.common.timing import Stopwatch
from swamp_fast.particles.schedule import total_particle_epochs
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.folder import Unfinished
from swamp_fast.version import __version__

REFRESH_SECONDS = 0.2  # least time between two updates of the status line


class Console:
    """Prints lines and, on a terminal, updates a status line below them. Prints nothing if `shown` is False."""

    def __init__(self, shown: bool, stream: TextIO | None = None) -> None:
        self.shown = shown
        self.stream = stream if stream is not None else sys.stderr
        self.moving = shown and self.stream.isatty()
        self._since_refresh = Stopwatch(REFRESH_SECONDS)

    def line(self, text: str) -> None:
        """Print a line above the status line."""
        if self.shown:
            self._clear()
            print(text, file=self.stream, flush=True)

    def status(self, text: str) -> None:
        """Replace the text of the status line; does nothing without a terminal."""
        if self.moving and self._since_refresh.seconds >= REFRESH_SECONDS:
            self._since_refresh.restart()
            self._clear()
            self.stream.write(text)
            self.stream.flush()

    def close(self) -> None:
        """Remove the status line."""
        self._clear()

    def _clear(self) -> None:
        if self.moving:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def introduction(problem: Problem, driver: str, unfinished: Unfinished | None, cycles_done: int) -> Iterator[str]:
    """Yield the lines before the first training: the model, the data, the cost, and where a resumed run continues."""
    config = problem.config
    yield f"swamp_fast {__version__}, {driver}"
    yield from problem.lines
    numbers = [config.particles_at(cycle) for cycle in range(config.cycles + 1)]
    particles = str(numbers[0]) if isinstance(config.particles, int) else f"{min(numbers)} … {max(numbers)}"
    yield (
        f"cost     {config.cycles + 1} trainings x {particles} particles x {config.epochs} epochs, and "
        f"{config.ticket_epochs} for the ticket: {total_particle_epochs(config):,} particle-epochs of "
        f"{problem.steps} steps, to density {percent((1 - config.prune) ** config.cycles)}"
    )
    if unfinished is not None:
        where = "the ticket" if unfinished.cycle is None else f"cycle {unfinished.cycle}"
        yield f"resumed  in {where} of {config.cycles}, after step {unfinished.steps}, from {config.run_dir}"
    elif cycles_done:
        yield f"resumed  after cycle {cycles_done - 1} of {config.cycles}, from {config.run_dir}"
    if config.run_dir is not None and problem.probe.keeps_state:
        yield "files    no checkpoints inside a cycle, because the model keeps state outside its parameters and buffers"


def cycle_line(row: Mapping[str, Any], cycles: int) -> str:
    """Return the line that is printed after a cycle."""
    text = f"cycle {row['cycle']:>2}/{cycles}  density {percent(row['density']):>8}"
    if row["accuracy"] is not None:
        each = row["particle_accuracy"]
        text += f"  test accuracy {percent(row['accuracy']):>8}  particles {percent(min(each))} … {percent(max(each))}"
    elif row["loss"] is not None:
        text += f"  test loss {row['loss']:.4f}"
    if row["val_accuracy"] is not None:
        text += f"  val accuracy {percent(row['val_accuracy'])}"
    return f"{text}  {duration(row['seconds'])}"
