"""Ctrl-C (SIGINT) and SIGTERM as requests to stop, which a run checks after each step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """A context, in the main thread, in which the first Ctrl-C or SIGTERM is only noted; a second one stops at once.

    asked  the signal that was received, or None
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers, except for signals that are ignored or not handled by Python."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN, self._note):  # runs that share this object enter it once each
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers."""
        self._restore()

    def stop(self) -> None:
        """Raise what the received signal requests: KeyboardInterrupt, or SystemExit(143)."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if os.getpid() == self._process:
            self.asked = number
        else:  # a child process inherited the handler, and has nothing to save
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
