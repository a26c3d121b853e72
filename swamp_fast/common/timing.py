"""Measuring time."""

from __future__ import annotations

import time


class Stopwatch:
    """Counts seconds; it starts at zero, running."""

    def __init__(self) -> None:
        self._counted = 0.0
        self._since: float | None = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long it ran."""
        return self._counted + (0.0 if self._since is None else time.perf_counter() - self._since)

    def restart(self) -> None:
        """Run again from zero."""
        self._counted, self._since = 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stop counting, until `resume`."""
        self._counted, self._since = self.seconds, None

    def resume(self, added: float = 0.0) -> None:
        """Count again; `added` are seconds of work that someone else measured meanwhile."""
        self._counted += added
        self._since = time.perf_counter()
