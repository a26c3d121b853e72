"""What is to be done, checked before anything runs: the model, the data, the callables, the settings."""

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

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Problem:
    """One call's arguments, checked and made ready; both drivers start from it."""

    config: SwampConfig
    original: nn.Module  # the user's, never touched
    template: nn.Module  # its copy on the device, to copy particles from
    layout: Layout
    mask: Tensor  # [Q] bool, what the first cycle keeps
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
    lines: tuple[str, ...]  # what to tell the user about it
    fingerprints: dict[str, Any]  # of what the settings don't tell

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return self.mask.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return weight_dtype(self.config)

    @property
    def classifies(self) -> bool:
        """Whether accuracies make sense."""
        return self.probe.classifies

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Where the batches of an epoch begin and end."""
        return batch_bounds(self.train.length, self.config.batch_size, self.drop_last)

    def autocast(self) -> torch.autocast:
        """bfloat16 activations over float32 weights, where asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def transformed(self, inputs: Any, step_key: Tensor) -> Any:
        """The user's own augmentation of one particle's batch, under a seed from its step's key [1, 3]."""
        if self.transform is None:
            return inputs
        seed_generators(int(seeds_for(step_key, LANE_SEED)[0, 0]))
        return self.transform(inputs)

    def seeded(self, step_key: Tensor) -> None:
        """Seed what a model draws besides dropout, if it does, from its step's key [1, 3]."""
        if self.probe.draws_elsewhere:
            seed_generators(int(seeds_for(step_key, LANE_SEED, 2)[0, 1]))

    def keys_of(self, cycle: int, number: int) -> Tensor:
        """The key [1, 3] that a model draws with outside training; the average comes after the particles."""
        return lane_keys([self.config.seed], [stream_of(cycle, number)], self.device)

    def outputs(self, model: nn.Module, inputs: Any, key: Tensor) -> Any:
        """A forward of one model outside training."""
        self.seeded(key)
        with DropoutStream(key), self.autocast():
            return self.forward(model, inputs)

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of every sample, [B] float32 or float64."""
        each = self.loss(outputs, targets)
        return each.flatten(1).mean(1) if each.dim() > 1 else each

    def kept(self, mask: Tensor) -> dict[str, int]:
        """How many weights a mask [Q] keeps, by parameter."""
        return {name: int(view.sum()) for name, view in self.layout.mask_views(mask).items()}

    def flops(self, mask: Tensor) -> int:
        """FLOPs of one sample's forward under a mask [Q]."""
        return self.probe.flops(self.kept(mask), {entry.name: entry.size for entry in self.layout.prunable})
