"""The schedule of a training: the learning rate of each step, and the weight of each sample in the average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swamp_fast.config import SwampConfig

ROUNDING = 1e-6  # in weights; a product such as 0.07 * 100 may lie just below a whole number


@dataclass(frozen=True)
class Training:
    """The schedule that all particles of a training share.

    epochs          the number of epochs
    lr              step -> learning rate; for a recipe's own optimizers, the factor of their initial rates
    average_weight  step -> weight in the average of the sample taken after the step; 0 if none is taken
    """

    epochs: int
    lr: Callable[[int], float]
    average_weight: Callable[[int], float]


def ticket_training(config: SwampConfig, steps_per_epoch: int, factors: Sequence[float] | None = None) -> Training:
    """Return the schedule of the ticket's training: `ticket_epochs` epochs, at the rate `lr` after the warm-up.

    factors  the recipe's schedule for a cycle, which the ticket's training follows from the start
    """
    first = config.initial_lr
    if factors is not None:
        rates = [first * factor for factor in factors]
        return Training(config.ticket_epochs, lambda step: rates[min(step, len(rates) - 1)], lambda step: 0.0)
    warmup = max(1, warmup_steps(config, steps_per_epoch))  # a single step of a warm-up has the rate lr
    return Training(config.ticket_epochs, lambda step: first * min(1.0, (step + 1) / warmup), lambda step: 0.0)


def cycle_training(config: SwampConfig, steps_per_epoch: int, factors: Sequence[float] | None = None) -> Training:
    """Return the schedule of a cycle's training, which is the same for every cycle.

    factors  the recipe's schedule: the factor of the initial rate at each step; None for the settings' schedule
    """

    def lr(step: int) -> float:
        if factors is not None:
            return config.initial_lr * factors[step]
        return learning_rate(config, steps_per_epoch, step)

    return Training(config.epochs, lr, lambda step: average_weight(config, steps_per_epoch, step))


def swa_first_epoch(config: SwampConfig) -> int:
    """Return the first epoch of the averaging window, counted from 0."""
    return min(math.floor(config.swa_start * config.epochs), config.epochs - 1)


def average_samples(config: SwampConfig, steps_per_epoch: int, steps: int) -> int:
    """Return how many samples the average has after `steps` steps of a cycle's training."""
    every = config.average_every or steps_per_epoch
    return max(0, steps - swa_first_epoch(config) * steps_per_epoch) // every


def average_weight(config: SwampConfig, steps_per_epoch: int, step: int) -> float:
    """Return the weight of the sample that the average takes after a step; 0 if it takes none.

    The n-th sample has the weight 1 / n in SWA's running mean. In an exponential moving average, every sample after the
    first has the weight 1 - `ema_decay`.
    """
    before, number = (average_samples(config, steps_per_epoch, steps) for steps in (step, step + 1))
    if config.average == "none" or number == before:
        return 0.0
    return 1 / number if config.average == "swa" or number == 1 else 1 - config.ema_decay


def warmup_steps(config: SwampConfig, steps_per_epoch: int) -> int:
    """Return the number of warm-up steps."""
    return round(config.warmup_epochs * steps_per_epoch)


def learning_rate(config: SwampConfig, steps_per_epoch: int, step: int) -> float:
    """Return the learning rate of a step of a cycle; see SwampConfig's `schedule`."""
    first, warmup = config.initial_lr, warmup_steps(config, steps_per_epoch)
    if step < warmup:
        return first * (step + 1) / warmup
    if config.schedule == "constant":
        return first
    if config.schedule == "step":
        return first * config.step_factor ** falls_until(config, step // steps_per_epoch)
    end, epochs = (config.window_lr, swa_first_epoch(config)) if config.ends_at_swa_lr else (0.0, config.epochs)
    step, steps = step - warmup, epochs * steps_per_epoch - warmup
    if step >= steps:
        return end
    if config.schedule == "linear":
        return first * (1 - step / steps)
    return end + (first - end) * (1 + math.cos(math.pi * step / steps)) / 2


def falls_until(config: SwampConfig, epoch: int) -> int:
    """Return how often the rate of schedule="step" has fallen at the start of an epoch."""
    if isinstance(config.step_epochs, int):
        return epoch // config.step_epochs
    return sum(fall <= epoch for fall in config.step_epochs)


def total_particle_epochs(config: SwampConfig) -> int:
    """Return the cost of a run in particle-epochs: the epochs of all particles in all cycles, plus the ticket's."""
    particles = sum(config.particles_at(cycle) for cycle in range(config.cycles + 1))
    return particles * config.epochs + config.ticket_epochs


def kept_at(config: SwampConfig, cycle: int, before: int, prunable: int) -> int:
    """Return how many weights a cycle keeps, where the cycle before it keeps `before` weights.

    With `target_density`, the last cycle keeps that share of the `prunable` weights.
    """
    kept = round((1 - config.prune) * before)
    if config.target_density is None:
        return kept
    target = math.floor(config.target_density * prunable + ROUNDING)
    return min(before, target if cycle == config.cycles else max(kept, target))
