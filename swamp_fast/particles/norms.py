"""The norms of a model that keep running statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def norms_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The norms among the modules' parts that keep running statistics."""
    parts = [part for module in modules for part in module.modules()]
    return [part for part in parts if isinstance(part, _NormBase) and part.running_mean is not None]


def reset_running_stats(modules: Iterable[nn.Module]) -> None:
    """Fresh statistics, as every cycle starts with."""
    for norm in norms_of(modules):
        norm.reset_running_stats()
