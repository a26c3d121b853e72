"""Processes that read data, and signals: one that goes to all processes serves the step under way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM)


WORKER_SECONDS = 30  # that it may live on after SIGTERM


def in_worker(number: int) -> None:
    """For a process that reads data: where a signal goes to all processes, it serves the step under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # as `held` had it when this process began


@contextmanager
def held() -> Iterator[None]:
    """While processes that read data begin: a signal waits until `in_worker` is ready for it, or until the end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
