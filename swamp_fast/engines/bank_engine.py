"""BankEngine: the base class of the eager and the fused engine."""

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
    """Trains one bank of particles at a time, and runs several models on the same inputs. A subclass runs the lanes.

    trainer  the trainer of the current bank; None before the first bank and after `release`
    joins    whether lanes of several runs may share a bank
    """

    problem: Problem
    trainer: Trainer | None
    joins: bool

    def bank_key(self, mask: Tensor) -> object:
        """A key of a run's mask [Q]. Runs may share a bank if their keys are equal.

        Each run of a shared bank must have the bits that it has alone. By default every mask has the key None.
        """
        return None

    def spawn(
        self,
        start: Solution,
        mask: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        config: SwampConfig | None = None,
    ) -> ParticleBank:
        """Returns a bank whose lanes all begin at `start` under a mask [Q], with one lane for each of `particles`.

        particles  the particles' numbers, which determine their random draws
        cycle      the cycle to train; None for the ticket's training
        config     the run's settings; None for those of the engine's problem
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
        """As `spawn`, but for R runs with the same particles. Run r begins at starts[r] under masks[r] of [R, Q]."""
        raise NotImplementedError

    def train(
        self,
        bank: ParticleBank,
        training: Training,
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Train all lanes to the end of a schedule; returns each lane's mean loss over the last epoch, [L].

        on_step   called after each step with the step's number
        on_epoch  called after each epoch's last step with the epoch and the mean losses [L]; before on_step
        state     a state of this training from which to resume; the result has the bits of an uninterrupted training
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
        """As `train`, but for R runs. Run r has trainings[r] and states[r]. All states must be of the same step."""
        assert self.trainer is not None
        assert self.trainer.bank is bank
        return self.trainer.train(trainings, on_step, on_epoch, None if states is None else joined(states))

    def state(self, run: int = 0) -> dict[str, Tensor]:
        """The state of one run of the bank between two steps. The current training can resume from it."""
        assert self.trainer is not None
        return self.trainer.state(run)

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> LaneRunner:
        """Returns a runner for M models of one run, in eval mode, with weights [M, P] and buffers [M, ...]."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The engine's choices and their reasons, as the run's record keeps them."""
        raise NotImplementedError

    def replay(self, record: dict[str, Any]) -> None:
        """Adopt the choices that were made by measured time in another process or run.

        record  what `describe` returned there
        """
        raise NotImplementedError

    def release(self) -> None:
        """Free the memory used for training and evaluation."""
        raise NotImplementedError
