"""Run several runs together: their trainings of the same cycle are the lanes of one bank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Generic

import torch
from torch import Tensor

from swamp_fast.cycle.training import Returned, TrainingOutcome, TrainingRequest, Trainings, Watch, alone
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.start import Engine
from swamp_fast.particles.bank import ParticleBank
from swamp_fast.problem.arguments import StopRun

PackEngine = EagerEngine | FusedEngine


def run_together(engine: Engine, runs: Sequence[Trainings[Returned]]) -> list[Returned | Exception]:
    """Do the trainings of runs that can share a bank. Returns each run's result, or the error that ended it.

    Runs at the same step of the same cycle are trained together; runs that are behind go first.
    """
    if not isinstance(engine, PackEngine) or not engine.joins:
        return [_run_alone(engine, run) for run in runs]
    queue = _Queue(runs, engine.bank_key)
    while queue.requests:
        group = queue.take()
        answers: Sequence[TrainingOutcome | Exception]
        try:
            answers = train_together(engine, list(group.values()))
        except Exception as error:
            engine.release()
            # Either one of the runs is at fault, or memory doesn't suffice for all: train them one at a time.
            if len(group) > 1:
                queue.separate(group)
                continue
            answers = [error]
        for number, answer in zip(group, answers, strict=True):
            queue.answer(number, answer)
        del answers, answer  # they hold the bank's memory, which the next one needs
    return [queue.ended[number] for number in range(len(runs))]


def _run_alone(engine: Engine, run: Trainings[Returned]) -> Returned | Exception:
    try:
        return alone(engine, run)
    except Exception as error:
        return error


class _Queue(Generic[Returned]):
    """The runs by index. Each run either waits for the training that it requested, or has ended.

    bank_key   returns the key of a mask [Q]; only runs with equal keys are trained in one bank
    separated  runs that are trained one at a time from now on
    """

    def __init__(self, runs: Sequence[Trainings[Returned]], bank_key: Callable[[Tensor], object]) -> None:
        self.runs, self.bank_key = runs, bank_key
        self.requests: dict[int, TrainingRequest] = {}
        self.ended: dict[int, Returned | Exception] = {}
        self.separated: set[int] = set()
        for number, run in enumerate(runs):
            self._advance(number, functools.partial(next, run))

    def take(self) -> dict[int, TrainingRequest]:
        """Remove and return the requests that are to be trained together next, by index of the run."""
        _align(self.requests.values())
        first = min(_position(request) for request in self.requests.values())
        numbers = [number for number, request in self.requests.items() if _position(request) == first]
        numbers = [number for number in numbers if number in self.separated][:1] or numbers
        keys = {number: self.bank_key(self.requests[number].mask) for number in numbers if len(numbers) > 1}
        numbers = [number for number in numbers if keys.get(number) == keys.get(numbers[0])]
        return {number: self.requests.pop(number) for number in numbers}

    def separate(self, group: dict[int, TrainingRequest]) -> None:
        """Put requests back, to be trained one at a time."""
        self.separated.update(group)
        self.requests.update(group)

    def answer(self, number: int, answer: TrainingOutcome | Exception) -> None:
        """Resume a run with the outcome of its training, or raise the error inside the run."""
        run = self.runs[number]
        if isinstance(answer, Exception):
            self._advance(number, functools.partial(run.throw, answer))
        else:
            self._advance(number, functools.partial(run.send, answer))

    def _advance(self, number: int, advance: Callable[[], TrainingRequest]) -> None:
        try:
            self.requests[number] = advance()
        except StopIteration as end:
            self.ended[number] = end.value
        except Exception as error:
            self.ended[number] = error


def _position(request: TrainingRequest) -> tuple[int, int]:
    """The cycle of a request (-1 for the ticket), and the step of the checkpoint from which it continues."""
    kept = request.run.checkpoint_of(request.cycle)
    return -1 if request.cycle is None else request.cycle, 0 if kept is None else kept.steps


def _align(requests: Iterable[TrainingRequest]) -> None:
    """Make all runs resume a training from the same step, that of their earliest checkpoint.

    The checkpoints are of different steps if the process was killed when it had written only some of them.
    """
    earliest: dict[int | None, int] = {}
    for request in requests:
        if (kept := request.run.checkpoint_of(request.cycle)) is not None:
            earliest[request.cycle] = min(kept.steps, earliest.get(request.cycle, kept.steps))
    for request in requests:
        if request.cycle in earliest:
            request.run.go_back_to(earliest[request.cycle])


def train_together(engine: PackEngine, requests: Sequence[TrainingRequest]) -> list[TrainingOutcome | Exception]:
    """Do the trainings of several runs, which have equal numbers of lanes and epochs, in one bank.

    Returns the outcome of each run, or the error of a run that diverged.
    """
    for request in requests:
        request.run.begin_training()
    first, masks = requests[0], torch.stack([request.mask for request in requests])
    starts, configs = [request.start for request in requests], [request.run.config for request in requests]
    bank = engine.spawn_runs(starts, masks, range(first.particles), first.cycle, configs)
    watched = _WatchedRuns(engine, bank, requests)
    for request in requests:
        request.run.keep_engine(engine.describe())
    trainings = [request.training for request in requests]
    try:
        losses = engine.train_runs(bank, trainings, watched.on_step, watched.on_epoch, watched.states_before)
    except _AllEnded:
        return [watched.errors[number] for number in range(len(requests))]
    return watched.outcomes(losses)


class _AllEnded(Exception):
    """Raised to end the training of a bank in which every run has diverged or was stopped."""


class _WatchedRuns:
    """The watches of runs that are trained in one bank, and by index, the errors of runs that diverged or were stopped.

    A callback stops a run by StopRun.
    """

    def __init__(self, engine: PackEngine, bank: ParticleBank, requests: Sequence[TrainingRequest]) -> None:
        self.engine, self.bank, self.requests = engine, bank, requests
        self.watches = [
            Watch(request, bank.of_run(number), functools.partial(engine.state, number))
            for number, request in enumerate(requests)
        ]
        self.errors: dict[int, Exception] = {}

    @property
    def states_before(self) -> list[dict[str, Tensor]] | None:
        """The states from which the trainings resume; None if they start from the beginning."""
        return [watch.state_before for watch in self.watches if watch.state_before is not None] or None

    def on_step(self, step: int) -> None:
        """Count a step of all runs. If one run needs a checkpoint, all get one, so that all are of the same step."""
        left = [watch for number, watch in enumerate(self.watches) if number not in self.errors]
        due = [watch.on_step(step) for watch in left]
        if any(due):
            for watch in left:
                watch.keep()
        for request in self.requests:
            request.run.stop_if_requested()

    def on_epoch(self, epoch: int, losses: Tensor) -> None:
        """Give each of the R runs the mean losses [L / R] of its lanes, and record the error of a run that ends."""
        for number, of_run in enumerate(losses.split(self.requests[0].particles)):
            try:
                if number not in self.errors:
                    self.watches[number].on_epoch(epoch, of_run)
            except (FloatingPointError, StopRun) as error:
                self.errors[number] = error
        if len(self.errors) == len(self.watches):
            raise _AllEnded

    def outcomes(self, losses: Tensor) -> list[TrainingOutcome | Exception]:
        """The outcome of each run, given the mean losses [L] of the last epoch, or the error of a run that ended."""
        outcomes: list[TrainingOutcome | Exception] = []
        parts = losses.split(self.requests[0].particles)
        for number, (watch, of_run) in enumerate(zip(self.watches, parts, strict=True)):
            watch.bank.buffers = self.bank.of_run(number).buffers
            if number in self.errors:
                outcomes.append(self.errors[number])
            else:
                side_by_side = functools.partial(self.engine.side_by_side, run=number)
                outcomes.append(watch.outcome(of_run, side_by_side, len(self.requests)))
        return outcomes
