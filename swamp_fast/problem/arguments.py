"""The keyword arguments that drivers take in addition to the model, the data and the settings, as one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.recipe import Recipe

Forward = Callable[[nn.Module, Any], Any]  # (model, inputs) -> outputs
Loss = Callable[[Any, Any], Tensor]  # (outputs, targets) -> [B]
Transform = Callable[[Any], Any]  # inputs [B, ...] -> inputs
OnEpoch = Callable[[dict[str, Any]], object]  # called with an epoch's row
# Called with a row of the history, or with the row and the cycle's Snapshot.
OnCycle = Callable[..., object]
Metric = Callable[[Any, Any], Tensor]  # (outputs, targets) -> [B], or a torchmetrics object
Metrics = Mapping[str, Metric]  # by name


class StopRun(Exception):
    """Raise this in `on_epoch` or `on_cycle` to end the run; the call returns the result of the finished cycles."""


CALLABLES = ("forward", "loss", "transform", "on_epoch", "on_cycle")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A driver's arguments other than the model, train, test and the settings. See fast_swamp for each of them.

    Raises TypeError if an argument that must be callable isn't.
    """

    val: object = None
    forward: Forward | None = None
    loss: Loss | None = None
    transform: Transform | None = None
    prunable: Prunable = None
    initial_masks: Mapping[str, Tensor] | None = None
    recipe: Recipe | None = None
    metrics: Metrics | None = None
    on_epoch: OnEpoch | None = None
    on_cycle: OnCycle | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for a callable argument that can't be called."""
        for name in CALLABLES:
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"`{name}` must be callable, got {type(function).__name__}.")
        if self.on_epoch is not None and not takes(self.on_epoch, 1):
            raise TypeError("`on_epoch` must take one argument, the row of an epoch.")
        if self.on_cycle is not None and not (takes(self.on_cycle, 1) or takes(self.on_cycle, 2)):
            raise TypeError("`on_cycle` must take one argument, the row of a cycle, or also a second, its snapshot.")
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            raise TypeError(f"`recipe` must be a swamp_fast.Recipe, got {type(self.recipe).__name__}.")
        if isinstance(self.loss, type):
            raise TypeError(f"`loss` must be an instance, got the class {self.loss.__name__}; call it first.")


def takes(function: Callable[..., object], count: int) -> bool:
    """Whether a function can be called with so many arguments, as far as its signature is known."""
    try:
        inspect.signature(function).bind(*[{}] * count)
    except TypeError:
        return False
    except ValueError:  # a function without a signature, such as some in C
        return True
    return True


# The source of the next two functions is part of a run's fingerprint. If it changes, even in a docstring, earlier runs
# can't be resumed any more, because they count as other runs.
def call(model: nn.Module, inputs: Any) -> Any:
    """The default `forward`."""
    return model(inputs)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The default `loss`."""
    return F.cross_entropy(outputs, targets, reduction="none")
