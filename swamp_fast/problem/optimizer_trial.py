"""Takes one step with a recipe's optimizers, before anything is trained, to find out their properties."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swamp_fast.particles.optimizer_state import NotSaved, read_state, with_inner
from swamp_fast.particles.random import generators_left_alone
from swamp_fast.problem.checks import particle_of
from swamp_fast.problem.gradients import listed
from swamp_fast.problem.recipe import Recipe

SCALE = 1e-3  # of the trial's random gradients


@dataclass(frozen=True)
class OwnOptimizer:
    """The properties of a recipe's optimizers.

    names          the names of the optimizers' classes
    needs_closure  whether step() needs a closure that computes loss and gradients again
    not_saved      the state that a checkpoint can't hold; None if it can hold all of it
    state_bytes    the bytes of one particle's state
    untrained      the names of the parameters that no optimizer trains
    """

    names: tuple[str, ...]
    needs_closure: bool
    not_saved: str | None
    state_bytes: int
    untrained: tuple[str, ...]


def try_optimizer(recipe: Recipe, template: nn.Module) -> OwnOptimizer | None:
    """Return the properties of a recipe's optimizers; None if the recipe has no optimizer.

    Raises TypeError or ValueError for optimizers that can't be used.
    """
    if recipe.optimizer is None:
        return None
    with generators_left_alone():
        try:
            optimizers, parameters = _stepped(recipe, template, with_closure=False)
            needs_closure = False
        except _StepRaised as without:
            try:
                optimizers, parameters = _stepped(recipe, template, with_closure=True)
            except _StepRaised as error:
                raise ValueError(
                    f"`recipe`: the optimizer's step() raises {type(error.error).__name__}: {error.error}; without a "
                    f"closure, {type(without.error).__name__}: {without.error}."
                ) from error.error
            needs_closure = True
    _check_rates(optimizers)
    trained = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    untrained = tuple(name for name, parameter in parameters.items() if id(parameter) not in trained)
    try:
        state, not_saved = read_state(optimizers, parameters), None
    except NotSaved as reason:
        state, not_saved = {}, str(reason)
    names = tuple(type(optimizer).__name__ for optimizer in optimizers)
    return OwnOptimizer(names, needs_closure, not_saved, sum(tensor.nbytes for tensor in state.values()), untrained)


class _StepRaised(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _stepped(
    recipe: Recipe, template: nn.Module, with_closure: bool
) -> tuple[list[Optimizer], dict[str, nn.Parameter]]:
    """Take one step on a copy of the model. Return the optimizers and the copy's trained parameters.

    Raises _StepRaised if the step fails.
    """
    model = particle_of(template).train()
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizers = recipe.optimizers(parameters)

    def closure() -> Tensor:
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter) * SCALE
        return torch.zeros((), device=parameter.device)

    for optimizer in optimizers:
        closure()
        try:
            optimizer.step(closure) if with_closure else optimizer.step()  # type: ignore[arg-type]
        except Exception as error:
            raise _StepRaised(error) from error
    return optimizers, parameters


def _check_rates(optimizers: list[Optimizer]) -> None:
    """Raise ValueError for a learning rate that is negative or not finite."""
    for optimizer in with_inner(optimizers):
        for group in optimizer.param_groups:
            rate = float(group.get("lr", 0.0))
            if not 0 <= rate < float("inf"):
                raise ValueError(f"`recipe`: optimizer has the learning rate {rate}; it must be finite and at least 0.")


def recipe_lines(own: OwnOptimizer | None) -> list[str]:
    """Return the console's lines about a recipe's optimizers."""
    if own is None:
        return []
    lines = [f"recipe   trained by {' and '.join(own.names)}"]
    if own.untrained:
        lines.append(f"note     the recipe's optimizers don't train: {listed(own.untrained)}")
    return lines
