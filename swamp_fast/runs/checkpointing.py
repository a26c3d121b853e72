"""When a training writes a checkpoint, and when it stops early: by the clock, and by Ctrl-C or SIGTERM on any rank."""

from __future__ import annotations

import signal

from swamp_fast.common.timing import Stopwatch
from swamp_fast.config import SwampConfig
from swamp_fast.distributed import Ranks
from swamp_fast.runs.console import Console
from swamp_fast.runs.signals import StopSignals

EXCHANGE_SECONDS = 0.2  # of training between two exchanges among the ranks: these then cost far less than 1 %


class StopPolicy:
    """Decides after each step whether a checkpoint is due, and ends the run when a signal requests it.

    Several ranks must decide alike after the same step, so they exchange what they know. Each exchange waits for the
    slowest rank, so it happens only once in several steps.
    """

    def __init__(self, config: SwampConfig, ranks: Ranks, signals: StopSignals) -> None:
        self.ranks, self.signals = ranks, signals
        self.run_dir, self.seconds_between = config.run_dir, 60 * config.checkpoint_minutes
        self.stop_signal: int | None = None  # that makes all ranks stop; None while they train
        self._since_checkpoint, self._since_exchange = Stopwatch(), Stopwatch()
        self._steps_between, self._steps_since_exchange = 1, 0

    def checkpoint_is_due(self) -> bool:
        """Count a step. Returns whether to write a checkpoint now, by the clock or because the run is to stop."""
        self._steps_since_exchange += 1
        if self._steps_since_exchange < self._steps_between:
            return False
        due = self._exchange(0 < self.seconds_between <= self._since_checkpoint.seconds)
        return self.run_dir is not None and (due or self.stop_signal is not None)

    def checkpoint_was_written(self) -> None:
        """Start the interval until the next checkpoint."""
        self._since_checkpoint.restart()

    def between_trainings(self, console: Console) -> None:
        """Stop here if any rank received a signal."""
        self._exchange(False)
        self.stop_if_requested(console)

    def stop_if_requested(self, console: Console) -> None:
        """Raise KeyboardInterrupt (Ctrl-C) or SystemExit (SIGTERM) if all ranks agreed to stop."""
        if self.stop_signal is None:
            return
        name = "Ctrl-C" if self.stop_signal == signal.SIGINT else "SIGTERM"
        console.line(f"stopped  by {name}; to continue, repeat the call with run_dir {self.run_dir}")
        self.signals.stop(self.stop_signal)

    def _exchange(self, due: bool) -> bool:
        """Agree with the other ranks on a stop signal, and on when to exchange next.

        Returns whether a checkpoint is due by the first rank's clock.
        """
        if self.ranks.world == 1:
            self.stop_signal = self.signals.received
            return due
        seconds_per_step = self._since_exchange.seconds / max(self._steps_since_exchange, 1)
        self._steps_since_exchange = 0
        self._since_exchange.restart()
        wait = min(EXCHANGE_SECONDS, self.seconds_between) if self.seconds_between > 0 else EXCHANGE_SECONDS
        first_rank_says = [int(due), max(1, int(wait / seconds_per_step))] if self.ranks.first else [0, 1]
        number, is_due, self._steps_between = self.ranks.all_reduce_max([self.signals.received or 0, *first_rank_says])
        self.stop_signal = number or None  # the agreed one: other ranks don't know of a later signal
        return bool(is_due)
