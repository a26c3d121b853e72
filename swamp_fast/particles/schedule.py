"""The learning rate of every step, and how much each SWA sample counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from swamp_fast.config import SwampConfig


@dataclass(frozen=True)
class Training:
    """One training of all particles: its length, the rate of each step, and the share of each epoch's SWA sample."""

    epochs: int
    lr: Callable[[int], float]  # of a step
    swa_weight: Callable[[int], float]  # of the sample at an epoch's end, 0 takes none


def ticket_training(config: SwampConfig) -> Training:
    """T0: dense, at the constant rate."""
    return Training(config.ticket_epochs, lambda step: config.lr, lambda epoch: 0.0)


def cycle_training(config: SwampConfig, steps_per_epoch: int) -> Training:
    """A full schedule, the same in every cycle."""
    return Training(
        config.epochs,
        lambda step: learning_rate(config, steps_per_epoch, step),
        lambda epoch: swa_weight(config, epoch),
    )


def swa_first_epoch(config: SwampConfig) -> int:
    """The epoch, counted from 0, at whose end the first SWA sample is taken."""
    return min(math.floor(config.swa_start * config.epochs), config.epochs - 1)


def swa_weight(config: SwampConfig, epoch: int) -> float:
    """The share of the sample at the end of `epoch` in the running mean; 0 before the window."""
    first = swa_first_epoch(config)
    return 1 / (epoch - first + 1) if config.swa and epoch >= first else 0.0


def learning_rate(config: SwampConfig, steps_per_epoch: int, step: int) -> float:
    """The rate of one step of a cycle: a cosine that moves every step, from `lr` to `swa_lr` at the start of the
    SWA window and constant there; or to 0 at the end, see `schedule`.
    """
    end, steps = (config.swa_lr, swa_first_epoch(config)) if config.ends_at_swa_lr else (0.0, config.epochs)
    steps *= steps_per_epoch
    if step >= steps:
        return end
    return end + (config.lr - end) * (1 + math.cos(math.pi * step / steps)) / 2


def total_particle_epochs(config: SwampConfig) -> int:
    """What a run costs: epochs over all trainings, particles and the ticket."""
    particles = sum(config.particles_at(cycle) for cycle in range(config.cycles + 1))
    return particles * config.epochs + config.ticket_epochs


def kept_after(kept: int, prune: float) -> int:
    """How many of `kept` weights the next cycle keeps."""
    return round((1 - prune) * kept)
