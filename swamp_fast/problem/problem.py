"""A problem to solve, already checked: the model, the data, the callables and the settings of one call."""

from __future__ import annotations

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
from swamp_fast.problem.arguments import Forward, Loss, OnCycle, Transform
from swamp_fast.problem.precision import weight_dtype
from swamp_fast.problem.probe import Probe


@dataclass(frozen=True)
class Problem:
    """The arguments of one call, checked and made ready; both drivers start from it."""

    config: SwampConfig
    original: nn.Module  # the user's, never changed
    template: nn.Module  # a copy on the device, from which particles are copied
    layout: Layout
    mask: Tensor  # [Q] bool, the weights that the first cycle keeps
    train: Data
    val: Data | None
    test: Data | None
    standardise: Standardise | None
    forward: Forward
    loss: Loss
    transform: Transform | None
    on_cycle: OnCycle | None
    drop_last: bool
    probe: Probe
    lines: tuple[str, ...]  # what the console says of it
    fingerprints: dict[str, Any]  # hashes of what a run's results depend on besides the settings

    @property
    def device(self) -> torch.device:
        """The device of the training."""
        return self.mask.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return weight_dtype(self.config)

    @property
    def classifies(self) -> bool:
        """Whether the model has accuracies."""
        return self.probe.classifies

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The first sample of each of an epoch's batches, and the end."""
        return batch_bounds(self.train.length, self.config.batch_size, self.drop_last)

    def autocast(self) -> torch.autocast:
        """A context in which activations are bfloat16, if precision is "bfloat16"."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def transformed(self, inputs: Any, step_key: Tensor) -> Any:
        """One particle's batch after the user's augmentation, which is seeded from the particle's step key [1, 3]."""
        if self.transform is None:
            return inputs
        seed_generators(int(seeds_for(step_key, LANE_SEED)[0, 0]))
        return self.transform(inputs)

    def seeded(self, step_key: Tensor) -> None:
        """Seed the global generators from a particle's step key [1, 3], if its forward draws from them."""
        if self.probe.draws_elsewhere:
            seed_generators(int(seeds_for(step_key, LANE_SEED, 2)[0, 1]))

    def keys_of(self, cycle: int, number: int) -> Tensor:
        """The key [1, 3] by which a model draws outside training; the average's `number` follows the particles'."""
        return lane_keys([self.config.seed], [stream_of(cycle, number)], self.device)

    def outputs(self, model: nn.Module, inputs: Any, key: Tensor) -> Any:
        """The outputs of one model outside training."""
        self.seeded(key)
        with DropoutStream(key), self.autocast():
            return self.forward(model, inputs)

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of every sample, [B]; a loss of more axes is averaged over them."""
        losses = self.loss(outputs, targets)
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses

    def kept(self, mask: Tensor) -> dict[str, int]:
        """How many weights a mask [Q] keeps, by the name of the parameter."""
        return {name: int(view.sum()) for name, view in self.layout.mask_views(mask).items()}

    def flops(self, mask: Tensor) -> int:
        """The FLOPs of one sample's forward under a mask [Q]."""
        return self.probe.flops(self.kept(mask), {entry.name: entry.size for entry in self.layout.prunable})
