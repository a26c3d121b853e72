"""The keyword arguments that drivers take in addition to the model, the data and the settings, as one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast.problem.prunable import Prunable

Forward = Callable[[nn.Module, Any], Any]  # (model, inputs) -> outputs
Loss = Callable[[Any, Any], Tensor]  # (outputs, targets) -> [B]
Transform = Callable[[Any], Any]  # inputs [B, ...] -> inputs
OnCycle = Callable[[dict[str, Any]], object]  # called with a row of the history


class StopRun(Exception):
    """Raise this in `on_cycle` to end the run after the cycle; the call returns the result of the cycles so far."""


# The callable arguments, and what each is called with.
CALLABLES = {
    "forward": ("the module", "inputs"),
    "loss": ("outputs", "targets"),
    "transform": ("inputs",),
    "on_cycle": ("the row of a cycle",),
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
    on_cycle: OnCycle | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for a callable argument that can't be called with what it is given."""
        for name, given in CALLABLES.items():
            if getattr(self, name) is not None:
                _check_callable(name, getattr(self, name), given)
        if callable(self.prunable):
            _check_callable("prunable", self.prunable, ("a parameter's name", "the parameter"))


def _check_callable(name: str, function: object, given: tuple[str, ...]) -> None:
    """Raise TypeError unless an argument is a function, or an object, that can be called with what is `given`."""
    if not callable(function):
        raise TypeError(f"`{name}` must be callable, got {type(function).__name__}.")
    if isinstance(function, type):
        raise TypeError(f"`{name}` must be an instance, got the class {function.__name__}; call it first.")
    if not _takes(function, len(given)):
        count = "one argument" if len(given) == 1 else "two arguments"
        raise TypeError(f"`{name}` must take {count}, {' and '.join(given)}; got {_signature(function)}.")


def _takes(function: Callable[..., object], count: int) -> bool:
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
