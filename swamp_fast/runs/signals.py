"""Turns Ctrl-C (SIGINT) and SIGTERM into requests to stop, which a run checks after each step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn


class StopSignals:
    """A context in which the first Ctrl-C or SIGTERM is only recorded; a second one has its usual effect at once.

    Outside the main thread, which alone may handle signals, the context does nothing.

    received  the signal that was received, or None
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers, except for a signal that is ignored or has a handler that Python didn't install."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN, self._note):  # several runs may enter a shared object
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers."""
        self._restore()

    def stop(self, number: int) -> NoReturn:
        """Record the signal `number` as received. Raises KeyboardInterrupt for SIGINT, SystemExit(143) for SIGTERM."""
        self.received = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if os.getpid() == self._process:
            self.received = number
        else:  # a child process inherited the handler, but it has nothing to save before it ends
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
