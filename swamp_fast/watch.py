"""Trainings, as a run asks for them, and what goes on around their steps: they are counted and kept, and particles that
diverge are seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from swamp_fast.bank import ParticleBank, Solution
from swamp_fast.checkpoint import Unfinished
from swamp_fast.engines import Engine
from swamp_fast.engines.trainer import Way
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

    dropped       lane -> epoch, counted from 1, at whose end its particle had diverged
    side_by_side  the engine's, for models under the training's mask
    """

    bank: ParticleBank
    losses: list[float]
    dropped: dict[int, int]
    seconds: float
    side_by_side: Callable[[Tensor, dict[str, Tensor]], Way]

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
    """One training by itself. Raises FloatingPointError, see Watch.on_epoch."""
    bank = engine.spawn(asked.start, asked.mask, asked.particles, asked.cycle, asked.run.config)
    asked.run.keep_engine(engine.describe())
    watch = Watch(asked, bank, engine.state)

    def on_step(step: int) -> None:
        watch.on_step(step)
        asked.run.stop_if_asked()

    losses = engine.train(bank, asked.training, on_step, watch.on_epoch, watch.state_before)
    return watch.trained(losses, engine.side_by_side)


class Watch:
    """The training of one run's bank; it goes on where the run's folder holds the middle of it.

    state_of      what the training goes on from, as it is now
    state_before  what the folder holds, or None
    dropped       lane -> epoch, counted from 1, at whose end its particle had diverged; it is in no average
    """

    def __init__(self, asked: Asked, bank: ParticleBank, state_of: Callable[[], dict[str, Tensor]]) -> None:
        self.asked, self.run, self.cycle, self.bank, self.state_of = asked, asked.run, asked.cycle, bank, state_of
        kept = self.run.kept_of(self.cycle)
        self.state_before = None if kept is None else kept.tensors
        self.dropped = {} if kept is None else dict(kept.dropped)
        self.began = time.perf_counter() - self.run.seconds_of(self.cycle)
        self.steps = len(self.run.problem.bounds)  # of an epoch

    @property
    def seconds(self) -> float:
        """How long it took so far, in every process."""
        return time.perf_counter() - self.began

    def trained(self, losses: Tensor, side_by_side: Callable[[Tensor, dict[str, Tensor]], Way]) -> Trained:
        """What it came to, with each lane's mean loss over the last epoch, [L]."""
        return Trained(self.bank, losses.tolist(), self.dropped, self.seconds, side_by_side)

    def on_step(self, step: int) -> None:
        """After a step."""
        where = f"{self.asked.shown}, epoch {step // self.steps + 1}/{self.asked.training.epochs}"
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
        return Unfinished(self.cycle, self.dropped, self.seconds, self.state_of())

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
