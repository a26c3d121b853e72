"""Lets only one driver run at a time in a process, and always under the same modes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from swamp_fast.common.modes import neutral_modes

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

RUNNING = threading.RLock()


def one_at_a_time(driver: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Decorate a driver so that it waits until no other thread runs one, and runs under neutral modes.

    Drivers change the global random generators and torch.nn.functional, which all threads share.
    """

    @functools.wraps(driver)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        with RUNNING, neutral_modes():
            return driver(*args, **kwargs)

    return call
