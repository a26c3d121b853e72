"""Runs the trainings that the driver requests. Between their steps, it writes checkpoints and detects divergence."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from swamp_fast.common.format import percent
from swamp_fast.common.timing import Stopwatch
from swamp_fast.distributed import Ranks
from swamp_fast.engines.start import Engine
from swamp_fast.engines.trainer import LaneRunner, joined, part_of
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.particles.optimizer_state import NotSaved
from swamp_fast.particles.schedule import Training, cycle_training, ticket_training
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.folder import Unfinished
from swamp_fast.runs.record import Run

Returned = TypeVar("Returned")
# A function of an engine that runs M models with weights [M, P] and buffers [M, ...] as lanes.
ModelsSideBySide = Callable[[Tensor, dict[str, Tensor]], LaneRunner]


@dataclass(frozen=True)
class TrainingRequest:
    """A request of a run to train `particles` lanes from `start` under a mask [Q].

    cycle  None for the ticket's training
    label  the training's name on the console
    """

    run: Run
    cycle: int | None
    start: Solution
    mask: Tensor
    particles: int
    training: Training
    label: str


def ticket_request(problem: Problem, run: Run, start: Solution) -> TrainingRequest:
    """Return the request for the ticket's training: one particle, dense."""
    everything = problem.layout.full_mask(problem.device)
    training = ticket_training(problem.rates, problem.steps_per_epoch, problem.rate_factors)
    return TrainingRequest(run, None, start, everything, 1, training, "ticket")


def cycle_request(problem: Problem, run: Run, cycle: int, start: Solution, mask: Tensor) -> TrainingRequest:
    """Return the request for the training of a cycle's particles."""
    config, particles = problem.config, problem.config.particles_at(cycle)
    density = percent(int(mask.sum()) / problem.layout.weights)
    label = f"cycle {cycle}/{config.cycles}, density {density}, {particles} particles"
    training = cycle_training(problem.rates, problem.steps_per_epoch, problem.rate_factors)
    return TrainingRequest(run, cycle, start, mask, particles, training, label)


@dataclass(frozen=True)
class Particles:
    """All particles of a training: weights [N, P], buffers [N, ...] and keys [N, 3].

    left  the numbers of the particles that did not diverge
    """

    weights: Tensor
    buffers: dict[str, Tensor]
    keys: Tensor
    left: list[int]

    def solution(self, number: int) -> Solution:
        """Return one particle as a Solution."""
        return Solution(self.weights[number].clone(), {name: each[number] for name, each in self.buffers.items()})


@dataclass(frozen=True)
class TrainingOutcome:
    """The outcome of a training.

    bank          the lanes of this rank
    count         the number of lanes on all ranks
    losses        each lane's mean loss over the last epoch
    dropped       lane of a diverged particle -> the epoch, counted from 1, in which it diverged
    seconds       how long the training took; if several runs shared the bank, each has an equal share of the time
    side_by_side  runs models as lanes under the training's mask
    """

    ranks: Ranks
    bank: ParticleBank
    count: int
    losses: list[float]
    dropped: dict[int, int]
    seconds: float
    side_by_side: ModelsSideBySide

    @property
    def left(self) -> list[int]:
        """The lanes that did not diverge."""
        return [lane for lane in range(self.count) if lane not in self.dropped]

    def particles(self, averaged: bool) -> Particles:
        """Return all lanes of all ranks, in order: their SWA means if `averaged`, else their last iterates."""

        def gathered(own: Tensor) -> Tensor:
            return self.ranks.gather(own, self.count)

        weights, keys = gathered(self.bank.solutions(averaged)), gathered(self.bank.keys)
        return Particles(weights, {name: gathered(each) for name, each in self.bank.buffers.items()}, keys, self.left)


Trainings = Generator[TrainingRequest, TrainingOutcome, Returned]


def train(run: Run, request: TrainingRequest) -> Trainings[TrainingOutcome]:
    """Request a training from whoever drives this generator, and return its outcome.

    The run's stopwatch then counts the seconds of this training, but not the time that other runs' trainings took
    before this generator continued.
    """
    run.stopwatch.pause()
    outcome = yield request
    run.stopwatch.resume(added=outcome.seconds)
    return outcome


def alone(engine: Engine, trainings: Trainings[Returned]) -> Returned:
    """Do the trainings that a run's generator requests, one after the other. Returns the generator's return value."""
    try:
        request = next(trainings)
        while True:
            request = trainings.send(do(engine, request))
    except StopIteration as end:
        returned: Returned = end.value
        return returned


def do(engine: Engine, request: TrainingRequest) -> TrainingOutcome:
    """Do one requested training. The run's ranks share its lanes.

    Raises FloatingPointError if particles diverged; see Watch.on_epoch.
    """
    ranks, run = request.run.ranks, request.run
    run.begin_training()
    ranks.agree(f"the mask of {request.label}", request.mask)
    bank = spawned(engine, request)
    watch = Watch(request, bank, engine.state)

    def on_step(step: int) -> None:
        if watch.on_step(step):
            watch.keep()
        run.stop_if_requested()

    if bank.lanes:
        losses = engine.train(bank, request.training, on_step, watch.on_epoch, watch.state_before)
    else:
        losses = watch.wait(on_step)
    return watch.outcome(ranks.gather(losses, request.particles), engine.side_by_side)


def spawned(engine: Engine, request: TrainingRequest) -> ParticleBank:
    """Return a bank with this rank's lanes.

    The engine may choose how to run them by timing. All ranks therefore use the first rank's choice.
    """
    run, particles, banks = request.run, request.run.ranks.share(request.particles), []

    def on_first_rank() -> dict[str, Any]:
        banks.append(engine.spawn(request.start, request.mask, particles, request.cycle, run.config))
        return engine.describe()

    run.share_engine(on_first_rank)
    if banks:
        return banks[0]
    engine.replay(run.engine)
    if particles:
        return engine.spawn(request.start, request.mask, particles, request.cycle, run.config)
    problem = run.problem
    empty = ParticleBank(problem.layout, [run.config], 0, problem.dtype, problem.device)
    empty.rewind_([request.start], request.mask[None], particles, request.cycle)
    return empty


class Watch:
    """Watches one training of a run: counts its steps, writes its checkpoints, and drops particles that diverge.

    If the run's folder holds a checkpoint of the training, the training continues from it.

    bank          the lanes of this rank, which may be none; all ranks together have `count` lanes
    state_of      returns the current state of those lanes, from which the training could be resumed
    state_before  the state of those lanes in the folder's checkpoint, or None without a checkpoint
    dropped       lane of a diverged particle -> the epoch, counted from 1, in which it diverged
    """

    def __init__(self, request: TrainingRequest, bank: ParticleBank, state_of: Callable[[], dict[str, Tensor]]) -> None:
        self.request, self.run, self.cycle, self.bank = request, request.run, request.cycle, bank
        self.state_of, self.count = state_of, request.particles
        checkpoint, own = self.run.checkpoint_of(self.cycle), self.run.ranks.share(self.count)
        self.state_before = None if checkpoint is None else part_of(checkpoint.tensors, own, self.count)
        self.dropped = {} if checkpoint is None else dict(checkpoint.dropped)
        self.stopwatch = Stopwatch(self.run.seconds_before(self.cycle))
        self.steps = self.run.problem.steps_per_epoch  # steps per epoch

    @property
    def seconds(self) -> float:
        """How long the training took so far, including in earlier processes that were interrupted."""
        return self.stopwatch.seconds

    def outcome(self, losses: Tensor, side_by_side: ModelsSideBySide, runs: int = 1) -> TrainingOutcome:
        """Return the training's outcome.

        losses  [N]  the mean losses over the last epoch, of all ranks' lanes
        runs    the number of runs that shared the bank, and so the time
        """
        ranks, seconds = self.run.ranks, self.seconds / runs
        return TrainingOutcome(ranks, self.bank, self.count, losses.tolist(), self.dropped, seconds, side_by_side)

    def wait(self, on_step: Callable[[int], None]) -> Tensor:
        """Take part in the messages between ranks, on a rank without lanes. Returns an empty tensor of losses [0]."""
        none = torch.zeros(0, dtype=torch.float64, device=self.bank.keys.device)
        done = 0 if self.state_before is None else int(self.state_before["done"])
        if done and done % self.steps == 0:
            self.on_epoch(done // self.steps - 1, none)
        for step in range(done, self.request.training.epochs * self.steps):
            if (step + 1) % self.steps == 0:
                self.on_epoch(step // self.steps, none)
            on_step(step)
        return none

    def on_step(self, step: int) -> bool:
        """Count a step. Returns whether to write a checkpoint now, by `keep`."""
        where = f"{self.request.label}, epoch {step // self.steps + 1}/{self.request.training.epochs}"
        return self.run.step(self.count, where) and self.run.problem.saves_steps

    def keep(self) -> None:
        """Write a checkpoint of the current state of the training, if a checkpoint can hold it."""
        try:
            self.run.keep_training(self.state())
        except NotSaved as reason:
            self.run.stops.checkpoint_was_written()  # the next try is a whole interval later
            self.run.warn_not_saved(str(reason))

    def on_epoch(self, epoch: int, losses: Tensor) -> None:
        """After an epoch, drop the particles that diverged.

        losses  [L]  the epoch's mean losses of this rank's lanes

        Raises FloatingPointError if a particle diverged and `on_divergence` is "stop", or if none is left.
        """
        finite = torch.isfinite(losses)
        for solutions in (self.bank.weights, self.bank.swa):
            finite &= torch.isfinite(solutions).all(1)
        losses, fine = self.run.ranks.gather(torch.stack([losses, finite.to(losses.dtype)], 1), self.count).unbind(1)
        self.run.keep_epoch(self.cycle, epoch, losses.tolist(), before_stop=self._keep_before_stop)
        diverged = [lane for lane, is_fine in enumerate(fine.tolist()) if not is_fine and lane not in self.dropped]
        if not diverged:
            return
        left = self.count - len(self.dropped) - len(diverged)
        if self.run.config.on_divergence == "stop" or left == 0:
            self._stop(epoch, diverged)
        for lane in diverged:
            self.dropped[lane] = epoch + 1
            self.run.warn_dropped(self.cycle or 0, lane, epoch + 1)

    def state(self) -> Unfinished:
        """Return the state from which the training can be resumed.

        On the first rank it holds the lanes of all ranks; on the other ranks its tensors are empty.
        """
        tensors = self.state_of() if self.bank.lanes else {}
        if self.run.ranks.world > 1:
            parts = self.run.ranks.gather_to_first({name: each.cpu() for name, each in tensors.items()})
            tensors = joined([part for part in parts if part]) if parts else {}
        return Unfinished(self.cycle, self.dropped, self.seconds, tensors)

    def _keep_before_stop(self) -> bool:
        """Write a checkpoint at the end of an epoch. Returns whether that is possible."""
        possible = self.run.problem.saves_steps
        if possible:
            self.keep()
        return possible

    def _stop(self, epoch: int, lanes: list[int]) -> None:
        run_dir = self.run.config.run_dir
        where = "the ticket" if self.cycle is None else f"cycle {self.cycle}"
        rates = "lr and swa_lr" if self.run.problem.own_optimizer is None else "the rates of the recipe's optimizer"
        which = f"particle{'s' if len(lanes) > 1 else ''} {', '.join(map(str, lanes))}"
        text = f"{where}, epoch {epoch + 1}: {which} diverged to NaN or infinity. Lower {rates}, or check the data."
        if run_dir is not None and self._keep_before_stop():
            text += (
                f" {run_dir} holds the run up to here. Started again, it would stop here again; with a changed lr it "
                "would be another run, which needs another folder."
            )
        if self.count > 1 and self.run.config.on_divergence == "stop":
            text += ' on_divergence="drop" continues the run without the diverged particles.'
        raise FloatingPointError(text)
