"""SIGINT and SIGTERM as a wish to stop, which a run looks at after each step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While it is open in the main thread, the first Ctrl-C or SIGTERM is kept as a wish; a second stops at once.

    asked  the signal that came, None until one does
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take the signals over, but those that are ignored or not Python's."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN, self._notice):  # runs that share this open it once each
                    self._before[number] = before
                    signal.signal(number, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        self._give_back()

    def stop(self) -> None:
        """Stop as the signal that came asks: KeyboardInterrupt, or SystemExit(143)."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._give_back()
        if os.getpid() == self._process:
            self.asked = number
        else:  # a child inherited this; it has nothing to stop in order
            os.kill(os.getpid(), number)

    def _give_back(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
