"""Signals in the processes that read data: after Ctrl-C they still serve the step in progress."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM)
SECONDS_AFTER_SIGTERM = 30  # that a process may go on reading


def in_worker(number: int) -> None:
    """Set up a process that reads data: a signal that goes to all processes must not end it within a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # `signals_held` blocked them when this process started


@contextmanager
def signals_held() -> Iterator[None]:
    """A context in which to start processes: signals wait until `in_worker` handles them, or until its end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
