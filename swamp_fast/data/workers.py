"""Signal handling in the processes that read data. After Ctrl-C, they still read the batch for the current step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_AFTER_SIGTERM = 30  # a process that reads data ends this long after a SIGTERM, if it has not ended before


def in_worker(number: int) -> None:
    """Set the signal handlers of a process that reads data.

    Ctrl-C and SIGTERM often go to all processes at once; they must not end this one in the middle of a step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # `signals_held` blocked them in the parent process


@contextmanager
def signals_held() -> Iterator[None]:
    """A context in which to start worker processes. It blocks the stop signals.

    A signal stays pending in a worker until `in_worker` sets its handlers, and in this process until the context ends.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
