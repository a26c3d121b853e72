"""Problem: the checked model, data, callables and settings of one call to a driver."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.tree import tree_clone
from swamp_fast.config import SwampConfig
from swamp_fast.data.standardise import Standardise
from swamp_fast.data.store import Batch, Data, batch_bounds
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.layout import Layout
from swamp_fast.particles.random import (
    LANE_SEED,
    at_time,
    drawn_samples,
    epoch_order,
    lane_keys,
    of_first_particle,
    seed_generators,
    seeds_for,
    stream_of,
)
from swamp_fast.problem.arguments import BatchTransform, Forward, Loss, Metrics, OnCycle, OnEpoch
from swamp_fast.problem.mixing import Mixed, mixed, mixes
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
    transform: BatchTransform | None
    recipe: Recipe
    own_optimizer: OwnOptimizer | None
    metrics: Metrics
    on_epoch: OnEpoch | None
    on_cycle: OnCycle | None
    drop_last: bool
    sample_weights: Tensor | None  # [n] float64, how often each training sample is drawn, in proportion
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

    @cached_property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps of an epoch."""
        return steps_of(self.train.length, self.config, self.drop_last)

    @property
    def batches_as_stored(self) -> bool:
        """Whether particles train on batches as the data give them, without `transform` and mixing."""
        return self.transform is None and not mixes(self.config)

    def epoch_keys(self, keys: Tensor, epoch: int) -> Tensor:
        """Return the keys [L, 3] of the order and the augmentation of an epoch, from the lanes' keys."""
        return at_time(self._of_batches(keys), epoch)

    def steps_of_epoch(self, epoch_keys: Tensor, first: int = 0) -> Iterator[list[Any]]:
        """Yield the handles of each step's batches, from the step `first` of the epoch on.

        epoch_keys  [L, 3]  see `epoch_keys`
        """
        size, order = self.config.accumulate, self.epoch_order(epoch_keys)
        drawn = self.sample_weights is not None
        handles = iter(self.train.batches(order, epoch_keys, self.bounds[first * size :], repeats=drawn))
        while of_step := list(islice(handles, size)):
            yield of_step

    def fetch(self, handle: Any, epoch_keys: Tensor, step_keys: Tensor, channels_last: bool = False) -> Batch:
        """Return the training batch of a handle, augmented by the keys [L, 3] of the epoch.

        A sample that is drawn several times is augmented anew each time, by the keys [L, 3] of the batch.
        """
        if self.sample_weights is None:
            return self.train.fetch(handle, epoch_keys, channels_last)
        return self.train.fetch(handle, self._of_batches(step_keys), channels_last, by_place=True)

    def first_batch_of(self, step: int) -> int:
        """Return the number of a step's first batch, counted like the step from the start of a training."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch * len(self.bounds) + place * self.config.accumulate

    def epoch_order(self, epoch_keys: Tensor) -> Tensor:
        """Return each lane's order [L, n] of the samples in an epoch: a permutation, or draws by `sample_weights`."""
        if self._distribution is None:
            return epoch_order(epoch_keys, self.train.length)
        return drawn_samples(epoch_keys, self._distribution)

    @cached_property
    def _distribution(self) -> Tensor | None:
        """For each sample, the probability that a draw gives this one or one before it."""
        if self.sample_weights is None:
            return None
        sums = self.sample_weights.cpu().cumsum(0)  # in the same order on every device
        return (sums / sums[-1]).to(self.device)

    def _of_batches(self, keys: Tensor) -> Tensor:
        """Return the keys [L, 3] by which batches are drawn; with `shared_order`, they are the first particle's."""
        return of_first_particle(keys) if self.config.shared_order else keys

    def autocast(self) -> torch.autocast:
        """Return a context with bfloat16 activations if precision is "bfloat16", else one that changes nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def particle_batch(self, inputs: Any, targets: Any, step_key: Tensor) -> tuple[Any, Any]:
        """Return the inputs and targets of one particle's batch after the user's transform, and mixup or CutMix.

        The particle's step key [1, 3] seeds the generators from which the transform may draw.
        """
        if self.batches_as_stored:
            return inputs, targets
        key = self._of_batches(step_key)
        if self.transform is not None:
            seed_generators(int(seeds_for(key, LANE_SEED)[0, 0]))
            inputs, targets = self.transform(inputs, targets)
        return mixed(inputs, targets, self.config, key) if mixes(self.config) else (inputs, targets)

    def seeded(self, step_key: Tensor) -> None:
        """Seed the global generators from a particle's step key [1, 3] if the model's forward pass draws from them."""
        if self.probe.draws_elsewhere:
            seed_generators(int(seeds_for(step_key, LANE_SEED, 2)[0, 1]))

    def seeded_for_optimizer(self, step_key: Tensor) -> None:
        """Seed the global generators from a particle's step key [1, 3] if the recipe's optimizers draw from them."""
        if self.own_optimizer is not None and self.own_optimizer.draws:
            seed_generators(int(seeds_for(step_key, LANE_SEED, 3)[0, 2]))

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
        """Return the loss of every sample, [B]. If the loss has further axes, it is averaged over them.

        The loss of a mixed sample is the weighted mean of its losses with both targets.
        """
        if isinstance(targets, Mixed):
            first = self.losses(tree_clone(outputs), targets.targets)  # a loss may change its arguments
            return targets.weight * first + (1 - targets.weight) * self.losses(outputs, targets.others)
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
