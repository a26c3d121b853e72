"""The schedule of a training: the learning rate of every step, and the weight of every SWA sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from swamp_fast.config import SwampConfig


@dataclass(frozen=True)
class Training:
    """The schedule that all particles of a training share."""

    epochs: int
    lr: Callable[[int], float]  # of a step
    swa_weight: Callable[[int], float]  # of the SWA sample at an epoch's end; 0: no sample is taken


def ticket_training(config: SwampConfig) -> Training:
    """The training of the ticket: `ticket_epochs` at the constant rate `lr`."""
    return Training(config.ticket_epochs, lambda step: config.lr, lambda epoch: 0.0)


def cycle_training(config: SwampConfig, steps_per_epoch: int) -> Training:
    """The training of a cycle, the same in every cycle."""
    return Training(
        config.epochs,
        lambda step: learning_rate(config, steps_per_epoch, step),
        lambda epoch: swa_weight(config, epoch),
    )


def swa_first_epoch(config: SwampConfig) -> int:
    """The epoch, counted from 0, at whose end the first SWA sample is taken."""
    return min(math.floor(config.swa_start * config.epochs), config.epochs - 1)


def swa_weight(config: SwampConfig, epoch: int) -> float:
    """The weight of the sample at the end of `epoch` in the running mean; 0 before the SWA window."""
    first = swa_first_epoch(config)
    return 1 / (epoch - first + 1) if config.swa and epoch >= first else 0.0


def learning_rate(config: SwampConfig, steps_per_epoch: int, step: int) -> float:
    """The rate of one step of a cycle: a cosine from `lr` down to `swa_lr` at the start of the SWA window, where it
    stays; or down to 0 at the end of the training, see `schedule`.
    """
    end, steps = (config.swa_lr, swa_first_epoch(config)) if config.ends_at_swa_lr else (0.0, config.epochs)
    steps *= steps_per_epoch
    if step >= steps:
        return end
    return end + (config.lr - end) * (1 + math.cos(math.pi * step / steps)) / 2


def total_particle_epochs(config: SwampConfig) -> int:
    """The cost of a run: epochs, summed over all particles of all trainings and the ticket."""
    particles = sum(config.particles_at(cycle) for cycle in range(config.cycles + 1))
    return particles * config.epochs + config.ticket_epochs


def kept_after(kept: int, prune: float) -> int:
    """The number of weights that the next cycle keeps of `kept`."""
    return round((1 - prune) * kept)
