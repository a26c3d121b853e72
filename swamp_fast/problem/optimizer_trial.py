"""Takes one step with a recipe's optimizers, before anything is trained, to find out their properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swamp_fast.common.fingerprint import value_fingerprint
from swamp_fast.common.format import described
from swamp_fast.particles.optimizer_state import PLAIN, NotSaved, read_state, with_inner
from swamp_fast.particles.random import generators_left_alone, generators_state
from swamp_fast.problem.checks import particle_of
from swamp_fast.problem.gradients import listed
from swamp_fast.problem.recipe import Recipe

SCALE = 1e-3  # of the trial's random gradients


@dataclass(frozen=True)
class OwnOptimizer:
    """The properties of a recipe's optimizers.

    names          the names of the optimizers' classes
    draws          whether step() draws from the global generators, which are then seeded for each step
    needs_closure  whether step() needs a closure that computes loss and gradients again
    not_saved      the state that a checkpoint can't hold; None if it can hold all of it
    state_bytes    the bytes of one particle's state
    untrained      the names of the parameters that no optimizer trains
    """

    names: tuple[str, ...]
    draws: bool
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
    trial = _stepped(recipe, template)
    optimizers, parameters = trial.optimizers, trial.parameters
    trained = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    untrained = tuple(name for name, parameter in parameters.items() if id(parameter) not in trained)
    try:
        state, not_saved = read_state(optimizers, parameters), trial.hidden_state()
    except NotSaved as reason:
        state, not_saved = {}, str(reason)
    return OwnOptimizer(
        names=tuple(type(optimizer).__name__ for optimizer in optimizers),
        draws=trial.draws,
        needs_closure=trial.with_closure,
        not_saved=not_saved,
        state_bytes=sum(tensor.nbytes for tensor in state.values()),
        untrained=untrained,
    )


class _StepRaised(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(described(error))


class _Trial:
    """The optimizers of a copy of the model, whose parameters get random gradients.

    draws  whether a step drew from the global generators
    """

    def __init__(self, recipe: Recipe, template: nn.Module, with_closure: bool) -> None:
        model = particle_of(template).train()
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.optimizers, self.with_closure, self.draws = recipe.optimizers(self.parameters), with_closure, False
        self.generator = torch.Generator().manual_seed(0)

    def closure(self) -> Tensor:
        """Give the parameters other gradients."""
        for parameter in self.parameters.values():
            drawn = torch.randn(parameter.shape, generator=self.generator, dtype=parameter.dtype)
            parameter.grad = SCALE * drawn.to(parameter.device)
        return torch.zeros((), device=parameter.device)

    def step(self) -> None:
        """Take a step. Raises _StepRaised if that fails."""
        with generators_left_alone():
            before = generators_state()
            for optimizer in self.optimizers:
                self.closure()
                try:
                    optimizer.step(self.closure) if self.with_closure else optimizer.step()  # type: ignore[arg-type]
                except Exception as error:
                    raise _StepRaised(error) from error
            self.draws |= before != generators_state()

    def hidden_state(self) -> str | None:
        """Take a step. Return what it changes in the optimizers' attributes that a checkpoint can't hold, or None."""
        before = self._attributes()
        self.step()
        changed = [name for name, value in self._attributes().items() if before.get(name) != value]
        return f"{changed[0]} changes in step()" if changed else None

    def _attributes(self) -> dict[str, str]:
        """Return the hashes of the attributes that `read_state` leaves out."""
        attributes = {}
        for optimizer in with_inner(self.optimizers):
            held = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
            for place, group in enumerate(optimizer.param_groups):
                held |= {f"param_groups[{place}][{key!r}]": value for key, value in group.items() if key != "params"}
            for name, value in held.items():
                if type(value) not in PLAIN and not isinstance(value, Optimizer):
                    attributes[f"{type(optimizer).__name__}.{name}"] = value_fingerprint(value)
        return attributes


def _stepped(recipe: Recipe, template: nn.Module) -> _Trial:
    """Return the optimizers of a copy of the model after one step, with a closure if they need one.

    Raises ValueError if the step fails either way.
    """
    trial = _made(recipe, template, with_closure=False)
    try:
        trial.step()
    except _StepRaised as without:
        trial = _made(recipe, template, with_closure=True)
        try:
            trial.step()
        except _StepRaised as error:
            also = "" if str(error) == str(without) else f"; without a closure, {without}"
            raise ValueError(f"`recipe`: the optimizer's step() raises {error}{also}.") from error.__cause__
    return trial


def _made(recipe: Recipe, template: nn.Module, with_closure: bool) -> _Trial:
    with generators_left_alone():
        trial = _Trial(recipe, template, with_closure)
    _check_rates(trial.optimizers)
    _check_parameters(trial.parameters)
    return trial


def _check_parameters(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError if the factory has changed the parameters that it was called with."""
    for name, parameter in parameters.items():
        hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooks or not parameter.requires_grad:
            what = "registers a hook on" if hooks else "freezes"
            raise ValueError(
                f"`recipe`: optimizer {what} {name}, which has no effect on the particles; the factory only makes "
                "optimizers. Freeze parameters in the model, or give their group the rate 0."
            )


def _check_rates(optimizers: list[Optimizer]) -> None:
    """Raise ValueError for a learning rate that is negative or not finite."""
    for optimizer in with_inner(optimizers):
        for group in optimizer.param_groups:
            given = group.get("lr", 0.0)
            try:
                rate = float(given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"`recipe`: optimizer has the learning rate {given!r}; it must be a number.") from error
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
