"""The keyword arguments that drivers take in addition to the model, the data and the settings, as one object."""

from __future__ import annotations

import dataclasses
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


NUMBERS = {1: "one argument", 2: "two arguments"}
# The callable arguments, and what each may be called with.
CALLABLES = {
    "forward": (("the module", "inputs"),),
    "loss": (("outputs", "targets"),),
    "transform": (("inputs",), ("inputs", "targets")),
    "on_epoch": (("the row of an epoch",),),
    "on_cycle": (("the row of a cycle",), ("the row of a cycle", "its snapshot")),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A driver's arguments other than the model, train, test and the settings. See fast_swamp for each of them.

    Raises TypeError if an argument that must be callable isn't, or takes another number of arguments.
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

    @classmethod
    def of(cls, local: Mapping[str, Any]) -> Arguments:
        """Return the arguments among a driver's local variables, which have the same names."""
        return cls(**{field.name: local[field.name] for field in dataclasses.fields(cls)})

    def __post_init__(self) -> None:
        """Raise TypeError for a callable argument that can't be called with what it is given."""
        for name, forms in CALLABLES.items():
            if getattr(self, name) is not None:
                _check_callable(name, getattr(self, name), *forms)
        if callable(self.prunable):
            _check_callable("prunable", self.prunable, ("a parameter's name", "the parameter"))
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            raise TypeError(f"`recipe` must be a swamp_fast.Recipe, got {type(self.recipe).__name__}.")


def _check_callable(name: str, function: object, *forms: tuple[str, ...]) -> None:
    """Raise TypeError unless an argument is a function, or an object, that can be called in one of the `forms`."""
    if not callable(function):
        raise TypeError(f"`{name}` must be callable, got {type(function).__name__}.")
    if isinstance(function, type):
        raise TypeError(f"`{name}` must be an instance, got the class {function.__name__}; call it first.")
    if not any(takes(function, len(form)) for form in forms):
        wanted = ", or ".join(f"{NUMBERS[len(form)]}, {' and '.join(form)}" for form in forms)
        raise TypeError(f"`{name}` must take {wanted}; got {_signature(function)}.")


def takes(function: Callable[..., object], count: int) -> bool:
    """Whether a function can be called with `count` arguments, as far as its signature is known."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a function without a signature, such as some in C
        return True
    return True


def _signature(function: Callable[..., object]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return f"{'a lambda' if name == '<lambda>' else name}{inspect.signature(function)}"


# The source of the next two functions is part of a run's fingerprint. If it changes, even in a docstring, earlier runs
# can't be resumed any more, because they count as other runs.
def call(model: nn.Module, inputs: Any) -> Any:
    """The default `forward`."""
    return model(inputs)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The default `loss`."""
    return F.cross_entropy(outputs, targets, reduction="none")
