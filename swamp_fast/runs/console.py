"""Progress on standard error: a line a cycle; on a terminal also one that moves."""

from __future__ import annotations

import sys
import time
from typing import TextIO

REFRESH_SECONDS = 0.2


class Console:
    """Prints lines, and on a terminal keeps one line moving below them. Silent if not `shown`."""

    def __init__(self, shown: bool, stream: TextIO | None = None) -> None:
        self.shown = shown
        self.stream = stream if stream is not None else sys.stderr
        self.moving = shown and self.stream.isatty()
        self.last_refresh = 0.0

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.shown:
            self._clear()
            print(text, file=self.stream, flush=True)

    def status(self, text: str) -> None:
        """Replace the line that moves; nothing where there is no terminal."""
        now = time.monotonic()
        if self.moving and now - self.last_refresh >= REFRESH_SECONDS:
            self.last_refresh = now
            self._clear()
            self.stream.write(text)
            self.stream.flush()

    def close(self) -> None:
        """Take the moving line away."""
        self._clear()

    def _clear(self) -> None:
        if self.moving:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
