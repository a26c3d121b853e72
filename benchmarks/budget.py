"""A time budget for work that can be interrupted at any moment and resumed later."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

from swamp_fast.common.timing import Stopwatch

SOFT_LIMIT = 0.9  # fraction of the budget after which work is asked to stop; it is asked again at each further 10 %


class Budget:
    """A context in which a timer sends SIGTERM to this process, first at SOFT_LIMIT of the budget, then repeatedly.

    While `working` is set, the signal raises SystemExit; a training ends after its current step. The signal is
    repeated because Python ignores an exception that is raised in a destructor.

    working      whether a signal may raise SystemExit now
    interrupted  whether a signal has come
    """

    def __init__(self, seconds: float) -> None:
        self.watch, self.seconds = Stopwatch(), seconds
        self.working = self.interrupted = False

    @property
    def spent(self) -> float:
        """The fraction of the budget that has been spent."""
        return self.watch.seconds / self.seconds

    @property
    def is_over(self) -> bool:
        """Whether the soft limit has been reached."""
        return self.spent >= SOFT_LIMIT

    def __enter__(self) -> Budget:
        self.handler_before = signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, SOFT_LIMIT * self.seconds, (1 - SOFT_LIMIT) * self.seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, self.handler_before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        if self.working:
            raise SystemExit(128 + number)
