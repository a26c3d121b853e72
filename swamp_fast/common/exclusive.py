"""One driver at a time in a process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")


Returned = TypeVar("Returned")


RUNNING = threading.RLock()


def one_at_a_time(driver: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """A driver that waits for another thread's: random generators and torch.nn.functional are the whole process's.

    Gradients are recorded even where the caller has turned that off.
    """

    @functools.wraps(driver)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        with RUNNING, torch.inference_mode(False), torch.enable_grad():
            return driver(*args, **kwargs)

    return call
