"""The keyword arguments that drivers take in addition to the model, the data and the settings, as one object."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast.common.tree import tree_map
from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.recipe import Recipe

Forward = Callable[[nn.Module, Any], Any]  # (model, inputs) -> outputs
Loss = Callable[[Any, Any], Tensor]  # (outputs, targets) -> [B]
Transform = Callable[..., Any]  # inputs [B, ...] -> inputs, or (inputs, targets) -> (inputs, targets)
OnEpoch = Callable[[dict[str, Any]], object]  # called with an epoch's row
# Called with a row of the history, or with the row and the cycle's Snapshot.
OnCycle = Callable[..., object]
Metric = Callable[[Any, Any], Tensor]  # (outputs, targets) -> [B], or a torchmetrics object
Metrics = Mapping[str, Metric]  # by name


class StopRun(Exception):
    """Raise this in `on_epoch` or `on_cycle` to end the run; the call returns the result of the finished cycles."""


TARGET_NAMES = ("targets", "labels", "y")
NUMBERS = {1: "one argument", 2: "two arguments"}
# The callable arguments, and the arguments with which each may be called.
CALLABLES = {
    "forward": (("the module", "inputs"),),
    "loss": (("outputs", "targets"),),
    "transform": (("inputs",), ("inputs", "targets")),
    "on_epoch": (("the row of an epoch",),),
    "on_cycle": (("the row of a cycle",), ("the row of a cycle", "its snapshot")),
}


OF_RECIPE = {
    "optimizer": ("the named parameters",),
    "schedule": ("the step", "the number of steps"),
    "score": ("the weights",),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A driver's arguments other than the model, train, test and the settings. See fast_swamp for each of them.

    Raises TypeError if an argument that must be callable isn't, or takes the wrong number of arguments.
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
        """Return the arguments from a driver's local variables, which have the same names."""
        return cls(**{field.name: local[field.name] for field in dataclasses.fields(cls)})

    def __post_init__(self) -> None:
        """Raise TypeError if a callable argument doesn't take the arguments with which it will be called."""
        for name, forms in CALLABLES.items():
            if getattr(self, name) is not None:
                _check_callable(name, getattr(self, name), *forms)
        if callable(self.prunable):
            _check_callable("prunable", self.prunable, ("a parameter's name", "the parameter"))
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            raise TypeError(f"`recipe` must be a swamp_fast.Recipe, got {type(self.recipe).__name__}.")
        for name, form in OF_RECIPE.items():
            if self.recipe is not None and getattr(self.recipe, name) is not None:
                _check_callable(f"recipe.{name}", getattr(self.recipe, name), form)


def _check_callable(name: str, function: object, *forms: tuple[str, ...]) -> None:
    """Raise TypeError unless a function or object can be called with the arguments of one of the `forms`."""
    if not callable(function):
        raise TypeError(f"`{name}` must be callable, got {type(function).__name__}.")
    if isinstance(function, type):
        raise TypeError(f"`{name}` must be an instance, got the class {function.__name__}; call it first.")
    call = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(call) or inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise TypeError(f"`{name}` must be a plain function, but it is a coroutine or a generator.")
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


@dataclass(frozen=True)
class BatchTransform:
    """A user's transform in either form, called as (inputs, targets) -> (inputs, targets).

    dtype  the type of the floating-point targets that it returns, such as the probabilities of classes
    """

    function: Transform
    takes_targets: bool
    dtype: torch.dtype

    def __call__(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Return the transformed batch. Raises TypeError if a transform that takes targets doesn't return a pair."""
        if not self.takes_targets:
            return self.function(inputs), targets
        pair = self.function(inputs, targets)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(
                f"`transform(inputs, targets)` must return a pair (inputs, targets), got {type(pair).__name__}. A "
                "transform of the inputs alone must not have a second parameter without a default."
            )
        return pair[0], tree_map(self._typed, pair[1])

    def _typed(self, leaf: Any) -> Any:
        return leaf.to(self.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def takes_targets(transform: Transform) -> bool | None:
    """Whether a transform takes inputs and targets rather than inputs alone, according to its signature.

    It takes both if its second positional parameter has no default, or is named targets, labels or y. Returns None if
    the signature has *args instead and so doesn't tell, as in torchvision.transforms.v2.
    """
    function = transform.forward if isinstance(transform, nn.Module) else transform
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function without a signature, such as some in C
        return False
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if len(positional) > 1:
        return positional[1].default is inspect.Parameter.empty or positional[1].name in TARGET_NAMES
    return None if any(each.kind == each.VAR_POSITIONAL for each in parameters) else False


# The source of the next two functions is part of a run's fingerprint. If it changes, even in a docstring, earlier runs
# can't be resumed any more, because they count as other runs.
def call(model: nn.Module, inputs: Any) -> Any:
    """The default `forward`."""
    return model(inputs)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The default `loss`."""
    return F.cross_entropy(outputs, targets, reduction="none")
