"""Recipe: the parts of a training recipe that are code, and so can't be settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swamp_fast.common.fingerprint import callable_fingerprint, tensor_fingerprint
from swamp_fast.config import SwampConfig, default_of

# (named_parameters) -> an optimizer, or a list of optimizers that share the parameters
OptimizerFactory = Callable[[Iterator[tuple[str, nn.Parameter]]], Optimizer | list[Optimizer]]
Schedule = Callable[[int, int], float]  # (step, steps) -> factor of each group's initial learning rate
Score = Callable[[Tensor], Tensor]  # weights [N, Q] -> [Q]

# Part of a recipe -> the settings that it replaces.
REPLACES = {
    "optimizer": ("optimizer", "lr", "swa_lr", "momentum", "nesterov", "beta1", "beta2", "adam_eps", "weight_decay"),
    "schedule": ("schedule", "swa_lr", "warmup_epochs", "step_epochs", "step_factor"),
    "score": ("mask_score", "layer_kept"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """The parts of a training recipe that are code. Each is optional, and replaces settings of SwampConfig.

    Attributes:
        optimizer: optimizer(named_parameters) -> a torch optimizer, or a list of them. It is called with the trained
            parameters of one particle, as (name, parameter) pairs, once for each particle of a training. Each
            particle has its own optimizers, as in a plain loop. Their learning rates are the initial ones, which the
            schedule multiplies. State of a weight's shape is masked like the weight. If step() needs a closure, as
            SAM's does, the closure computes loss and gradients again, on the same batch and with the same random
            draws; running statistics of norms are those of the first pass.
        schedule: schedule(step, steps) -> the factor of each learning rate, at least 0, where `steps` is the number of
            optimizer steps of a cycle. The ticket is a checkpoint of such a training: its step t has schedule(t,
            steps), or schedule(steps - 1, steps) if it is longer than a cycle.
        score: score(weights [N, Q]) -> [Q], at least 0: the score of each prunable weight, by which the global
            threshold ranks them, from the N particles of a cycle.
        sample_weights: [n], at least 0: how often each training sample is drawn, in proportion. Each epoch draws as
            many samples as there are, with replacement. With a fraction as `val`, n counts all samples of `train`; the
            weights of those that are held out are left out. A sample that is drawn again is augmented anew. The
            statistics of norms are re-estimated on each training sample once.

    Raises TypeError for a part of another type.
    """

    optimizer: OptimizerFactory | None = None
    schedule: Schedule | None = None
    score: Score | None = None
    sample_weights: Tensor | Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for a part that isn't callable."""
        for name in ("optimizer", "schedule", "score"):
            part = getattr(self, name)
            if part is not None and not callable(part):
                raise TypeError(f"`recipe`: {name} must be callable, got {type(part).__name__}.")
            if isinstance(part, Optimizer):
                raise TypeError("`recipe`: optimizer must be a function that makes one, got an optimizer.")

    def check(self, config: SwampConfig) -> None:
        """Raise ValueError for settings that this recipe replaces."""
        for part, settings in REPLACES.items():
            if getattr(self, part) is None:
                continue
            for name in settings:
                if getattr(config, name) != default_of(name):
                    raise ValueError(
                        f"`{name}` = {getattr(config, name)!r} has no effect beside a recipe with {part}=...; leave "
                        f"one of them out."
                    )

    def fingerprint(self) -> dict[str, Any]:
        """Return the hashes of the parts, by name; those that are None are left out."""
        parts = {name: getattr(self, name) for name in ("optimizer", "schedule", "score")}
        hashes: dict[str, Any] = {name: callable_fingerprint(part) for name, part in parts.items() if part is not None}
        if self.sample_weights is not None:
            hashes["sample_weights"] = tensor_fingerprint(torch.as_tensor(self.sample_weights))
        return hashes
