"""Finds and resets the norm layers of a model that keep running statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def norms_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the norm layers in the modules that keep running statistics."""
    children = [child for module in modules for child in module.modules()]
    return [child for child in children if isinstance(child, _NormBase) and child.running_mean is not None]


def reset_running_stats(modules: Iterable[nn.Module]) -> None:
    """Reset the running statistics of the norm layers in modules that are in train mode.

    Norms that the model's own `train()` leaves in evaluation mode are frozen: they keep their statistics.
    """
    for norm in norms_of(modules):
        if norm.training:
            norm.reset_running_stats()
