"""Problem: the checked model, data, callables and settings of one call to a driver."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.config import SwampConfig
from swamp_fast.data.standardise import Standardise
from swamp_fast.data.store import Data, batch_bounds
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.layout import Layout
from swamp_fast.particles.random import LANE_SEED, lane_keys, seed_generators, seeds_for, stream_of
from swamp_fast.problem.arguments import Forward, Loss, Metrics, OnCycle, OnEpoch, Transform
from swamp_fast.problem.optimizer_trial import OwnOptimizer
from swamp_fast.problem.precision import weight_dtype
from swamp_fast.problem.probe import Probe
from swamp_fast.problem.recipe import Recipe


@dataclass(frozen=True)
class Problem:
    """The checked arguments of one call, ready for training. Both drivers start from a Problem."""

    config: SwampConfig
    original: nn.Module  # the user's model, which is never changed
    template: nn.Module  # its copy on the device, from which particles are copied
    layout: Layout
    mask: Tensor  # [Q] bool, True for the weights that the first cycle keeps
    train: Data
    val: Data | None
    test: Data | None
    standardise: Standardise | None
    forward: Forward
    loss: Loss
    transform: Transform | None
    recipe: Recipe
    own_optimizer: OwnOptimizer | None
    metrics: Metrics
    on_epoch: OnEpoch | None
    on_cycle: OnCycle | None
    drop_last: bool
    probe: Probe
    lines: tuple[str, ...]  # the console's description of the problem
    rate_factors: tuple[float, ...] | None  # of a cycle's steps, by the recipe's schedule
    fingerprints: dict[str, Any]  # hashes of everything besides the settings that a run's results depend on

    @property
    def device(self) -> torch.device:
        """The device on which the run is computed."""
        return self.mask.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights."""
        return weight_dtype(self.config)

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """For each batch of an epoch, the slice [begin, end) of the sample order that the batch takes."""
        return batch_bounds(self.train.length, self.config.batch_size, self.drop_last)

    @property
    def rates(self) -> SwampConfig:
        """The settings that give the learning rates, or the factors of those of a recipe's optimizers."""
        return self.config if self.own_optimizer is None else dataclasses.replace(self.config, lr=1.0)

    def scored_at(self, cycle: int) -> bool:
        """Whether a later mask needs a score of this cycle's particles that their average alone doesn't determine."""
        if self.recipe.score is not None:
            return self.config.mask_from == "last" or cycle == 0
        return self.config.scored_at(cycle)

    @property
    def saves_steps(self) -> bool:
        """Whether a checkpoint can hold the state of a training between two steps."""
        saves_optimizer = self.own_optimizer is None or self.own_optimizer.not_saved is None
        return saves_optimizer and not self.probe.keeps_state

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps of an epoch."""
        return steps_of(self.train.length, self.config, self.drop_last)

    def autocast(self) -> torch.autocast:
        """Return a context with bfloat16 activations if precision is "bfloat16", else one that changes nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def transformed(self, inputs: Any, step_key: Tensor) -> Any:
        """Return one particle's batch after the user's augmentation.

        The particle's step key [1, 3] seeds the generators from which the augmentation may draw.
        """
        if self.transform is None:
            return inputs
        seed_generators(int(seeds_for(step_key, LANE_SEED)[0, 0]))
        return self.transform(inputs)

    def seeded(self, step_key: Tensor) -> None:
        """Seed the global generators from a particle's step key [1, 3] if the model's forward pass draws from them."""
        if self.probe.draws_elsewhere:
            seed_generators(int(seeds_for(step_key, LANE_SEED, 2)[0, 1]))

    def keys_of(self, cycle: int, number: int) -> Tensor:
        """Return the key [1, 3] of a model's random draws outside training.

        number  the index of the particle; the average's index is one more than the last particle's
        """
        return lane_keys([self.config.seed], [stream_of(cycle, number)], self.device)

    def outputs(self, model: nn.Module, inputs: Any, key: Tensor) -> Any:
        """Run one model outside training, with random draws from `key`, and return its outputs."""
        self.seeded(key)
        with DropoutStream(key), self.autocast():
            return self.forward(model, inputs)

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of every sample, [B]. If the loss has further axes, it is averaged over them."""
        losses = self.loss(outputs, targets)
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses

    def backward(self, loss: Tensor, parameters: list[Tensor]) -> None:
        """Add the gradients of a loss to those of some parameters, and to nothing that belongs to the user."""
        loss.backward(inputs=parameters if self.probe.outside else None)

    def kept(self, mask: Tensor) -> dict[str, int]:
        """Return, by parameter name, the number of weights that a mask [Q] keeps."""
        return {name: int(view.sum()) for name, view in self.layout.mask_views(mask).items()}

    def flops(self, mask: Tensor) -> int:
        """Return the FLOPs of one sample's forward pass under a mask [Q]."""
        return self.probe.flops(self.kept(mask), {entry.name: entry.size for entry in self.layout.prunable})


def steps_of(samples: int, config: SwampConfig, drop_last: bool) -> int:
    """Return the number of optimizer steps of an epoch; each takes `accumulate` batches, the last one the rest."""
    batches = len(batch_bounds(samples, config.batch_size, drop_last))
    return -(-batches // config.accumulate)
