"""BankEngine: what the eager and the fused engine have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.engines.trainer import LaneRunner, Trainer, joined
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.particles.schedule import Training
from swamp_fast.problem.problem import Problem


class BankEngine:
    """Trains one bank of particles at a time, and runs models side by side; how lanes run is up to the subclass.

    trainer  of the current bank; None before the first and after `release`
    joins    whether lanes of several runs may share a bank
    """

    problem: Problem
    trainer: Trainer | None
    joins: bool

    def bank_key(self, mask: Tensor) -> object:
        """What masks [Q] of runs must have in common to share a bank, so that each run keeps the bits it has alone."""
        return None

    def spawn(
        self,
        start: Solution,
        mask: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        config: SwampConfig | None = None,
    ) -> ParticleBank:
        """The bank at `start` under a mask [Q], with one lane for each of `particles`.

        particles  the particles' numbers, which determine their random draws
        config     the run's settings, if they aren't those of the engine's problem
        """
        return self.spawn_runs([start], mask[None], particles, cycle, [config or self.problem.config])

    def spawn_runs(
        self,
        starts: Sequence[Solution],
        masks: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        configs: Sequence[SwampConfig],
    ) -> ParticleBank:
        """As `spawn` for R runs with the same particles, each from its own start and under its own mask, [R, Q]."""
        raise NotImplementedError

    def train(
        self,
        bank: ParticleBank,
        training: Training,
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Train all lanes through a schedule; returns each lane's mean loss over the last epoch, [L].

        on_step   called with the step's number after each step
        on_epoch  called with the epoch and the mean losses [L] after an epoch's last step, before on_step
        state     of this training, to resume from; the result has the bits of an uninterrupted training
        """
        return self.train_runs(bank, [training], on_step, on_epoch, None if state is None else [state])

    def train_runs(
        self,
        bank: ParticleBank,
        trainings: Sequence[Training],
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
        states: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> Tensor:
        """As `train` for R runs, each with its own schedule and state; the states are all of the same step."""
        assert self.trainer is not None
        assert self.trainer.bank is bank
        return self.trainer.train(trainings, on_step, on_epoch, None if states is None else joined(states))

    def state(self, run: int = 0) -> dict[str, Tensor]:
        """A run's state between two steps of the current training, from which it can resume."""
        assert self.trainer is not None
        return self.trainer.state(run)

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> LaneRunner:
        """Models of one run with weights [M, P] and buffers [M, ...], in eval mode, to run on the same inputs."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What ran, how, and why, for the run's record."""
        raise NotImplementedError

    def replay(self, record: dict[str, Any]) -> None:
        """Adopt what a stopwatch chose in another process or run, as its `describe` recorded it."""
        raise NotImplementedError

    def release(self) -> None:
        """Free the memory of training and evaluation."""
        raise NotImplementedError
