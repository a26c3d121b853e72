"""The keyword arguments that every driver takes beside its model, its data and its settings, as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast.problem.prunable import Prunable

Forward = Callable[[nn.Module, Any], Any]  # (model, inputs) -> outputs
Loss = Callable[[Any, Any], Tensor]  # (outputs, targets) -> [B]
Transform = Callable[[Any], Any]  # inputs [B, ...] -> inputs
OnCycle = Callable[[dict[str, Any]], object]  # of a row of the history

CALLABLES = ("forward", "loss", "transform", "on_cycle")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The data, callables and masks that a driver takes beside its settings; fast_swamp documents each of them.

    Raises TypeError for one that should be callable and isn't.
    """

    val: object = None
    forward: Forward | None = None
    loss: Loss | None = None
    transform: Transform | None = None
    prunable: Prunable = None
    initial_masks: Mapping[str, Tensor] | None = None
    on_cycle: OnCycle | None = None

    def __post_init__(self) -> None:
        """Check the callables."""
        for name in CALLABLES:
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"`{name}` must be callable, got {type(function).__name__}.")


# Their source is part of a run's fingerprint: a change of it, even of a docstring, makes every earlier run another.
def call(model: nn.Module, inputs: Any) -> Any:
    """The default `forward`."""
    return model(inputs)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The default `loss`."""
    return F.cross_entropy(outputs, targets, reduction="none")
