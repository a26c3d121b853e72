"""Trainings, as a run asks for them, and what goes on around their steps: they are counted and kept, and particles that
diverge are seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from swamp_fast.distributed import Ranks
from swamp_fast.engines.start import Engine
from swamp_fast.engines.trainer import LaneRunner, joined, part_of
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.particles.schedule import Training
from swamp_fast.runs.checkpoint import Unfinished
from swamp_fast.runs.record import Run

Returned = TypeVar("Returned")


SideBySide = Callable[
    [Tensor, dict[str, Tensor]], LaneRunner
]  # of an engine: models of weights [M, P] and buffers [M, ...]


@dataclass(frozen=True)
class TrainingRequest:
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
class Particles:
    """All particles of a training: weights [N, P], buffers [N, ...], keys [N, 3]; `left` are those not diverged."""

    weights: Tensor
    buffers: dict[str, Tensor]
    keys: Tensor
    left: list[int]


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training came to: `count` lanes, each one's mean loss over the last epoch, and how long it took.

    seconds       of runs that shared a bank each has an equal share
    bank          this rank's lanes
    dropped       lane -> epoch, counted from 1, at whose end its particle had diverged
    side_by_side  the engine's, for models under the training's mask
    """

    ranks: Ranks
    bank: ParticleBank
    count: int
    losses: list[float]
    dropped: dict[int, int]
    seconds: float
    side_by_side: SideBySide

    @property
    def left(self) -> list[int]:
        """The lanes that didn't diverge."""
        return [lane for lane in range(self.count) if lane not in self.dropped]

    def particles(self, averaged: bool) -> Particles:
        """What all lanes of all ranks trained to, in order: their SWA means, or their last iterates."""

        def gathered(own: Tensor) -> Tensor:
            return self.ranks.gather(own, self.count)

        weights, keys = gathered(self.bank.solutions(averaged)), gathered(self.bank.keys)
        return Particles(weights, {name: gathered(each) for name, each in self.bank.buffers.items()}, keys, self.left)


Trainings = Generator[TrainingRequest, TrainingOutcome, Returned]


def alone(engine: Engine, trainings: Trainings[Returned]) -> Returned:
    """Do one run's trainings, each as it is asked for; returns what the run returns."""
    try:
        asked = next(trainings)
        while True:
            asked = trainings.send(do(engine, asked))
    except StopIteration as end:
        returned: Returned = end.value
        return returned


def do(engine: Engine, asked: TrainingRequest) -> TrainingOutcome:
    """One training by itself, its lanes shared among the run's ranks. Raises FloatingPointError, see Watch.on_epoch."""
    ranks, run = asked.run.ranks, asked.run
    run.begin_training()
    ranks.agree(f"the mask of {asked.shown}", asked.mask)
    bank = spawned(engine, asked)
    watch = Watch(asked, bank, engine.state)

    def on_step(step: int) -> None:
        if watch.on_step(step):
            watch.keep()
        run.stop_if_asked()

    if bank.lanes:
        losses = engine.train(bank, asked.training, on_step, watch.on_epoch, watch.state_before)
    else:
        losses = watch.wait(on_step)
    return watch.trained(ranks.gather(losses, asked.particles), engine.side_by_side)


def spawned(engine: Engine, asked: TrainingRequest) -> ParticleBank:
    """The bank of this rank's lanes. What is decided by a stopwatch for it, the first rank decides."""
    run, particles, banks = asked.run, asked.run.ranks.share(asked.particles), []

    def first() -> dict[str, Any]:
        banks.append(engine.spawn(asked.start, asked.mask, particles, asked.cycle, run.config))
        return engine.describe()

    run.keep_engine(run.ranks.broadcast_from_first(first))
    if banks:
        return banks[0]
    engine.replay(run.engine)
    if particles:
        return engine.spawn(asked.start, asked.mask, particles, asked.cycle, run.config)
    problem = run.problem
    none = ParticleBank(problem.layout, [run.config], 0, problem.dtype, problem.device)
    none.rewind_([asked.start], asked.mask[None], particles, asked.cycle)
    return none


class Watch:
    """The training of one run's bank; it goes on where the run's folder holds the middle of it.

    bank          the lanes of this rank, of `count` in all; there may be none
    state_of      what the training of those lanes goes on from, as it is now
    state_before  what the folder holds of it, or None
    dropped       lane -> epoch, counted from 1, at whose end its particle had diverged; it is in no average
    """

    def __init__(self, asked: TrainingRequest, bank: ParticleBank, state_of: Callable[[], dict[str, Tensor]]) -> None:
        self.asked, self.run, self.cycle, self.bank, self.state_of = asked, asked.run, asked.cycle, bank, state_of
        self.count = asked.particles
        kept, own = self.run.kept_of(self.cycle), self.run.ranks.share(self.count)
        self.state_before = None if kept is None else part_of(kept.tensors, own, self.count)
        self.dropped = {} if kept is None else dict(kept.dropped)
        self.began = time.perf_counter() - self.run.seconds_of(self.cycle)
        self.steps = len(self.run.problem.bounds)  # of an epoch

    @property
    def seconds(self) -> float:
        """How long it took so far, in every process."""
        return time.perf_counter() - self.began

    def trained(self, losses: Tensor, side_by_side: SideBySide, runs: int = 1) -> TrainingOutcome:
        """What it came to, with the mean loss over the last epoch of each lane of all ranks, and of so many runs."""
        ranks, told = self.run.ranks, losses.tolist()
        return TrainingOutcome(ranks, self.bank, self.count, told, self.dropped, self.seconds / runs, side_by_side)

    def wait(self, on_step: Callable[[int], None]) -> Tensor:
        """Without a lane: what others do between their steps takes all ranks."""
        none = torch.zeros(0, dtype=torch.float64, device=self.bank.keys.device)
        done = 0 if self.state_before is None else int(self.state_before["done"])
        if done and done % self.steps == 0:
            self.on_epoch(done // self.steps - 1, none)
        for step in range(done, self.asked.training.epochs * self.steps):
            if (step + 1) % self.steps == 0:
                self.on_epoch(step // self.steps, none)
            on_step(step)
        return none

    def on_step(self, step: int) -> bool:
        """After a step; returns whether to `keep` the training."""
        where = f"{self.asked.shown}, epoch {step // self.steps + 1}/{self.asked.training.epochs}"
        return self.run.step(self.count, where) and not self.run.problem.probe.keeps_state

    def keep(self) -> None:
        """Record the training under way."""
        self.run.keep_training(self.state())

    def on_epoch(self, epoch: int, losses: Tensor) -> None:
        """After an epoch with mean losses [L] of this rank's lanes: drop the particles that diverged, or stop.

        Raises FloatingPointError if one diverged and `on_divergence` says so, or if none is left.
        """
        finite = torch.isfinite(losses)
        for solutions in (self.bank.weights, self.bank.swa):
            finite &= torch.isfinite(solutions).all(1)
        losses, fine = self.run.ranks.gather(torch.stack([losses, finite.to(losses.dtype)], 1), self.count).unbind(1)
        self.run.keep_epoch(self.cycle, epoch, losses.tolist())
        new = [lane for lane, is_fine in enumerate(fine.tolist()) if not is_fine and lane not in self.dropped]
        if not new:
            return
        left = self.count - len(self.dropped) - len(new)
        if self.run.config.on_divergence == "stop" or left == 0:
            self._stop(epoch, new)
        for lane in new:
            self.dropped[lane] = epoch + 1
            self.run.tell_dropped(self.cycle or 0, lane, epoch + 1)

    def state(self) -> Unfinished:
        """All that the training goes on from, between two steps; that of all ranks on the first, nothing elsewhere."""
        own = self.state_of() if self.bank.lanes else {}
        if self.run.ranks.world > 1:
            parts = self.run.ranks.gather_to_first({name: each.cpu() for name, each in own.items()})
            own = joined([part for part in parts if part]) if parts else {}
        return Unfinished(self.cycle, self.dropped, self.seconds, own)

    def _stop(self, epoch: int, lanes: list[int]) -> None:
        keeps = self.run.config.run_dir is not None and not self.run.problem.probe.keeps_state
        where = "the ticket" if self.cycle is None else f"cycle {self.cycle}"
        which = f"particle{'s' if len(lanes) > 1 else ''} {', '.join(map(str, lanes))}"
        text = (
            f"{where}, epoch {epoch + 1}: {which} diverged to NaN or infinity. Lower lr and swa_lr, or check the data."
        )
        if keeps:
            self.keep()
            text += (
                f" {self.run.config.run_dir} holds the run as it is now, and started again it stops here again; other "
                "settings are another run."
            )
        if self.count > 1 and self.run.config.on_divergence == "stop":
            text += ' on_divergence="drop" goes on without such particles.'
        raise FloatingPointError(text)
