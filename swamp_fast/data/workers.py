"""Signal handling in the processes that read data. After Ctrl-C, they still read the batch for the current step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, get_worker_info

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_AFTER_SIGTERM = 30  # a process that reads data ends this long after a SIGTERM, if it has not ended before


@dataclass(frozen=True)
class WorkerStart:
    """Calls the worker_init_fn of a user's DataLoader, which finds its own Dataset in get_worker_info()."""

    dataset: Dataset[Any]
    function: Callable[[int], object]

    def __call__(self, number: int) -> None:
        """Call the function with the worker's number, in the worker."""
        object.__setattr__(get_worker_info(), "dataset", self.dataset)  # was the SeededSamples around it
        self.function(number)


def in_worker(number: int, start: Callable[[int], object] | None = None) -> None:
    """Set the signal handlers of a process that reads data, and call `start` with its number.

    Ctrl-C and SIGTERM often go to all processes at once; they must not end this one in the middle of a step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # `signals_held` blocked them in the parent process
    if start is not None:
        start(number)


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
