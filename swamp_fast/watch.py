"""Trainings, as a run asks for them, and what goes on around their steps: they are counted and kept, and particles that
diverge are seen.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from swamp_fast.bank import ParticleBank, Solution
from swamp_fast.checkpoint import Unfinished
from swamp_fast.engines import Engine
from swamp_fast.run import Run
from swamp_fast.schedule import Training

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Asked:
    """A training that a run asks for: `particles` lanes at `start` under a mask [Q]; cycle None is the ticket's.

    shown  what the console calls it
    """

    run: Run
    cycle: int | None
    start: Solution
    mask: Tensor
    particles: int
    training: Training
    shown: str


@dataclass(frozen=True)
class Trained:
    """What a training came to: the bank, each lane's mean loss over the last epoch, and how long it took.

    dropped  lane -> epoch, counted from 1, at whose end its particle had diverged
    """

    bank: ParticleBank
    losses: list[float]
    dropped: dict[int, int]
    seconds: float

    @property
    def left(self) -> list[int]:
        """The lanes that didn't diverge."""
        return [lane for lane in range(self.bank.lanes) if lane not in self.dropped]


Trainings = Generator[Asked, Trained, Returned]


def alone(engine: Engine, trainings: Trainings[Returned]) -> Returned:
    """Do one run's trainings, each as it is asked for; returns what the run returns."""
    try:
        asked = next(trainings)
        while True:
            asked = trainings.send(do(engine, asked))
    except StopIteration as end:
        returned: Returned = end.value
        return returned


def do(engine: Engine, asked: Asked) -> Trained:
    """One training by itself."""
    bank = engine.spawn(asked.start, asked.mask, asked.particles, asked.cycle)
    asked.run.keep_engine(engine.describe())
    watch = Watch(engine, asked.run, bank, asked.cycle, asked.shown)
    losses = watch.train(asked.training).tolist()
    return Trained(bank, losses, watch.dropped, watch.seconds)


class Watch:
    """The training of one bank, cycle None the ticket's; it goes on where the run's folder holds the middle of it.

    shown    what the console calls it
    dropped  lane -> epoch, counted from 1, at whose end its particle had diverged; it is in no average
    """

    def __init__(self, engine: Engine, run: Run, bank: ParticleBank, cycle: int | None, shown: str) -> None:
        self.engine, self.run, self.bank, self.cycle, self.shown = engine, run, bank, cycle, shown
        self.kept = run.kept_of(cycle)
        self.dropped = {} if self.kept is None else dict(self.kept.dropped)
        self.began = time.perf_counter() - run.seconds_of(cycle)
        self.steps, self.epochs = len(run.problem.bounds), 0  # of an epoch, of the training

    @property
    def seconds(self) -> float:
        """How long it took so far, in every process."""
        return time.perf_counter() - self.began

    def train(self, training: Training) -> Tensor:
        """Train; returns each lane's mean loss over the last epoch, [L]. Raises FloatingPointError, see `on_epoch`."""
        self.epochs = training.epochs
        state = None if self.kept is None else self.kept.tensors
        return self.engine.train(self.bank, training, self.on_step, self.on_epoch, state)

    def on_step(self, step: int) -> None:
        """After a step."""
        where = f"{self.shown}, epoch {step // self.steps + 1}/{self.epochs}"
        self.run.step(self.bank.lanes, where, None if self.run.problem.probe.keeps_state else self.state)

    def on_epoch(self, epoch: int, losses: Tensor) -> None:
        """After an epoch with mean losses [L]: drop the particles that diverged, or stop.

        Raises FloatingPointError if one diverged and `on_divergence` says so, or if none is left.
        """
        self.run.keep_epoch(self.cycle, epoch, losses.tolist())
        finite = torch.isfinite(losses)
        for solutions in (self.bank.weights, self.bank.swa):
            finite &= torch.isfinite(solutions).all(1)
        new = [lane for lane, fine in enumerate(finite.tolist()) if not fine and lane not in self.dropped]
        if not new:
            return
        left = self.bank.lanes - len(self.dropped) - len(new)
        if self.run.config.on_divergence == "stop" or left == 0:
            self._stop(epoch, new)
        for lane in new:
            self.dropped[lane] = epoch + 1
            self.run.tell_dropped(self.cycle or 0, lane, epoch + 1)

    def state(self) -> Unfinished:
        """All that the training goes on from, between two steps."""
        return Unfinished(self.cycle, self.dropped, self.seconds, self.engine.state())

    def _stop(self, epoch: int, lanes: list[int]) -> None:
        keeps = self.run.folder is not None and not self.run.problem.probe.keeps_state
        where = "the ticket" if self.cycle is None else f"cycle {self.cycle}"
        which = f"particle{'s' if len(lanes) > 1 else ''} {', '.join(map(str, lanes))}"
        text = (
            f"{where}, epoch {epoch + 1}: {which} diverged to NaN or infinity. Lower lr and swa_lr, or check the data."
        )
        if keeps:
            self.run.keep_training(self.state())
            text += (
                f" {self.run.config.run_dir} holds the run as it is now, and started again it stops here again: other "
                "settings need another run_dir."
            )
        if self.bank.lanes > 1 and self.run.config.on_divergence == "stop":
            text += ' on_divergence="drop" goes on without such particles.'
        raise FloatingPointError(text)
