"""Recipe: the parts of a training recipe that are code, which settings can't express."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swamp_fast.common.fingerprint import callable_fingerprint, callable_parts, tensor_fingerprint
from swamp_fast.common.format import described, dtype_name
from swamp_fast.config import SwampConfig, default_of
from swamp_fast.problem.gradients import listed

# (named_parameters) -> an optimizer, or a list of optimizers that share the parameters
OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], Optimizer | list[Optimizer]]
Schedule = Callable[[int, int], float]  # (step, steps) -> factor of each group's initial learning rate
Score = Callable[[Tensor], Tensor]  # weights [N, Q] -> [Q]

CODE = ("optimizer", "schedule", "score")  # the parts that are functions
# Part of a recipe -> the settings that it replaces.
REPLACES = {
    "optimizer": (
        *("optimizer", "lr", "swa_lr", "momentum", "nesterov", "beta1", "beta2", "adam_eps", "weight_decay"),
        *("groups", "decay_norms_and_biases"),
    ),
    "schedule": ("schedule", "swa_lr", "warmup_epochs", "step_epochs", "step_factor"),
    "score": ("mask_score", "layer_kept"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """The parts of a training recipe that are code. All are optional, and most replace settings of SwampConfig.

    Attributes:
        optimizer: optimizer(named_parameters) -> a torch optimizer, or a list of them. It is called once for each
            particle of a training, with a list of the particle's trained parameters as (name, parameter) pairs. Each
            particle has its own optimizers, as in a plain loop. The learning rates of the optimizers are the initial
            ones, which the schedule multiplies. Optimizer state with the shape of a weight is masked like the weight.
            If step() draws random numbers, torch's, Python's and NumPy's generators are seeded for each particle and
            step. If step() needs a closure, as SAM's does, the closure computes the loss and the gradients again, on
            the same batch and with the same random draws. The running statistics of norms are those of the first pass.
        schedule: schedule(step, steps) -> the factor of the initial learning rates at a step, at least 0. `steps` is
            the number of optimizer steps of a cycle. The ticket's training follows the schedule from the start of a
            cycle; if it is longer than a cycle, its remaining steps use the last factor. The function is called for
            every step before anything is trained.
        score: score(weights [N, Q]) -> [Q], at least 0: the score by which the global threshold ranks the prunable
            weights, computed from the N particles of a cycle.
        sample_weights: [n], at least 0: the relative frequency with which each training sample is drawn. Each epoch
            draws as many samples as the training data have, with replacement. If `val` is a fraction, n counts all
            samples of `train`, and the weights of held-out samples are ignored. A sample that is drawn several times
            is augmented anew each time. The statistics of norms are re-estimated on each training sample once.

    Raises TypeError for a part of the wrong type.
    """

    optimizer: OptimizerFactory | None = None
    schedule: Schedule | None = None
    score: Score | None = None
    sample_weights: Tensor | Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for a part that isn't callable."""
        for name in CODE:
            part = getattr(self, name)
            if part is not None and not callable(part):
                raise TypeError(f"`recipe`: {name} must be callable, got {type(part).__name__}.")
            if isinstance(part, Optimizer):
                raise TypeError("`recipe`: optimizer must be a function that makes one, got an optimizer.")

    def check(self, config: SwampConfig) -> None:
        """Raise ValueError if a setting has no effect beside this recipe, or contradicts it."""
        for part, settings in REPLACES.items():
            if getattr(self, part) is None:
                continue
            for name in settings:
                if getattr(config, name) != default_of(name):
                    raise ValueError(
                        f"`{name}` = {getattr(config, name)!r} has no effect beside a recipe with {part}=...; leave "
                        "one of them out."
                    )
        if self.score is not None and config.combine == "best":
            raise ValueError(
                '`recipe`: a score ranks by all particles, but combine="best" keeps one of them; set combine="mean".'
            )

    def optimizers(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        """Make the optimizers of one particle, given its trained parameters by name.

        Raises TypeError if the factory returns anything but optimizers, and ValueError if two optimizers have the same
        parameter, or if one has a parameter of another model.
        """
        assert self.optimizer is not None
        try:
            made = self.optimizer([*parameters.items()])
        except Exception as error:
            raise ValueError(f"`recipe`: optimizer raises {described(error)}.") from error
        optimizers = list(made) if isinstance(made, list | tuple) else [made]
        wrong = [each for each in optimizers if not isinstance(each, Optimizer)]
        if wrong or not optimizers:
            kind = f"a {type(made).__name__} with {type(wrong[0]).__name__}" if wrong and wrong != [made] else ""
            kind = kind or (type(made).__name__ if wrong else "an empty list")
            raise TypeError(
                f"`recipe`: optimizer must return a torch.optim.Optimizer or a list of them, got {kind}. A schedule "
                "goes into Recipe(schedule=...) or the setting `schedule`."
            )
        names = {id(parameter): name for name, parameter in parameters.items()}
        has = [id(p) for each in optimizers for group in each.param_groups for p in group["params"]]
        if any(place not in names for place in has):
            raise ValueError(
                "`recipe`: optimizer must use the parameters that it is called with, which are one particle's; it made "
                "an optimizer of other parameters, such as those of your own model."
            )
        twice = {names[place] for place in has if has.count(place) > 1}
        if twice:
            raise ValueError(f"`recipe`: two of the optimizers have the same parameters: {listed(sorted(twice))}.")
        return optimizers

    def factors(self, steps: int) -> tuple[float, ...] | None:
        """Return the schedule's factor for each of `steps` steps, or None without a schedule.

        Raises ValueError for a factor that is not a finite number of at least 0.
        """
        if self.schedule is None:
            return None
        factors: list[float] = []
        for step in range(steps):
            try:
                factor = self.schedule(step, steps)
                if isinstance(factor, Tensor) and factor.numel() == 1:
                    factor = factor.item()
            except Exception as error:
                raise ValueError(f"`recipe`: schedule({step}, {steps}) raises {described(error)}.") from error
            if not isinstance(factor, numbers.Real) or not 0 <= factor < sys.float_info.max:
                raise ValueError(
                    f"`recipe`: schedule({step}, {steps}) must be a finite number of at least 0, got {factor!r}; it is "
                    "the factor of the initial learning rates."
                )
            factors.append(float(factor))
        return tuple(factors)

    def try_score(self, particles: Iterable[int], prunable: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compute the score of random weights for each number of particles. Raises what `scores` raises."""
        for count in sorted(set(particles)) if self.score is not None else ():
            drawn = torch.randn(count, prunable, generator=torch.Generator().manual_seed(0), dtype=dtype)
            self.scores(drawn.to(device))

    def scores(self, weights: Tensor) -> Tensor:
        """Return the score [Q] of the prunable weights [N, Q] of a cycle's particles.

        Weights that are 0 in every particle, as pruned ones are, have the score 0.

        Raises TypeError for a score that is no floating-point tensor [Q], and ValueError for one that is negative or
        NaN, or for an error that the function raises.
        """
        assert self.score is not None
        try:
            scores = self.score(weights.clone())
        except Exception as error:
            raise ValueError(f"`recipe`: score raises {described(error)} for weights {list(weights.shape)}.") from error
        fits = isinstance(scores, Tensor) and scores.shape == weights.shape[1:] and not scores.is_complex()
        if not fits or scores.is_meta or scores.layout != torch.strided:
            kind = f"{dtype_name(scores.dtype)} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores)
            raise TypeError(f"`recipe`: score must return real numbers [Q] = {list(weights.shape[1:])}, got {kind}.")
        scores = scores.detach().to(weights).masked_fill((weights == 0).all(0), 0.0)
        if not bool((scores >= 0).all()):
            raise ValueError("`recipe`: score must return numbers of at least 0, but some are negative or NaN.")
        return scores

    def fingerprint(self, changed: Mapping[str, Collection[str]]) -> dict[str, Any]:
        """Return the hashes of the parts, by name; those that are None are left out.

        changed  for each part, what its calls change, such as a counter; the hash leaves that out
        """
        hashes: dict[str, Any] = {
            name: callable_fingerprint(getattr(self, name), changed[name])
            for name in CODE
            if getattr(self, name) is not None
        }
        if self.sample_weights is not None:
            hashes["sample_weights"] = tensor_fingerprint(torch.as_tensor(self.sample_weights))
        return hashes

    def parts(self) -> dict[str, dict[str, str]]:
        """Return the hashes of what each of the functions holds, as they are now."""
        return {name: callable_parts(getattr(self, name)) for name in CODE}
