"""The schedule of a training: the learning rate of each step, and the weight of each SWA sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from swamp_fast.config import SwampConfig

ROUNDING = 1e-6  # weights; products such as 0.07 * 100 may fall just below a whole number


@dataclass(frozen=True)
class Training:
    """The schedule that all particles of a training share.

    epochs      the number of epochs
    lr          step -> learning rate
    swa_weight  epoch -> weight of the SWA sample at its end in the running mean; 0 takes no sample
    """

    epochs: int
    lr: Callable[[int], float]
    swa_weight: Callable[[int], float]


def ticket_training(config: SwampConfig) -> Training:
    """Return the schedule of the ticket's training: `ticket_epochs` epochs at the constant rate `lr`."""
    return Training(config.ticket_epochs, lambda step: config.initial_lr, lambda epoch: 0.0)


def cycle_training(config: SwampConfig, steps_per_epoch: int) -> Training:
    """Return the schedule of a cycle's training, which is the same for every cycle."""
    return Training(
        config.epochs,
        lambda step: learning_rate(config, steps_per_epoch, step),
        lambda epoch: swa_weight(config, epoch),
    )


def swa_first_epoch(config: SwampConfig) -> int:
    """Return the first epoch of the SWA window, counted from 0; the first SWA sample is taken at its end."""
    return min(math.floor(config.swa_start * config.epochs), config.epochs - 1)


def swa_weight(config: SwampConfig, epoch: int) -> float:
    """Return the weight in the running mean of the SWA sample at the end of an epoch; 0 before the SWA window."""
    first = swa_first_epoch(config)
    return 1 / (epoch - first + 1) if config.average == "swa" and epoch >= first else 0.0


def learning_rate(config: SwampConfig, steps_per_epoch: int, step: int) -> float:
    """Return the learning rate of a step of a cycle; see SwampConfig's `schedule`.

    With SWA's schedule, it is a cosine from `lr` to `swa_lr` at the start of the SWA window, and constant from there.
    Otherwise it is a cosine from `lr` to 0 at the end of the training.
    """
    end, steps = (config.window_lr, swa_first_epoch(config)) if config.ends_at_swa_lr else (0.0, config.epochs)
    steps *= steps_per_epoch
    if step >= steps:
        return end
    return end + (config.initial_lr - end) * (1 + math.cos(math.pi * step / steps)) / 2


def total_particle_epochs(config: SwampConfig) -> int:
    """Return the cost of a run in particle-epochs: the epochs of all particles in all trainings, and the ticket's."""
    particles = sum(config.particles_at(cycle) for cycle in range(config.cycles + 1))
    return particles * config.epochs + config.ticket_epochs


def kept_at(config: SwampConfig, cycle: int, before: int, prunable: int) -> int:
    """Return how many weights a cycle keeps of the `before` weights that the cycle before it keeps.

    With `target_density`, the last cycle keeps that share of the `prunable` weights.
    """
    kept = round((1 - config.prune) * before)
    if config.target_density is None:
        return kept
    target = math.floor(config.target_density * prunable + ROUNDING)
    return min(before, target if cycle == config.cycles else max(kept, target))
