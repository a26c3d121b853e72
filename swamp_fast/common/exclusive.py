"""Lets only one driver run at a time in a process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

RUNNING = threading.RLock()


def one_at_a_time(driver: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Decorate a driver so that it waits until no other thread runs one.

    Drivers change the global random generators and torch.nn.functional, which all threads share. The driver also
    records gradients if the caller has turned that off.
    """

    @functools.wraps(driver)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        with RUNNING, torch.inference_mode(False), torch.enable_grad():
            return driver(*args, **kwargs)

    return call
