"""Several runs at once: their trainings of one cycle in one bank, where the engine can."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swamp_fast.engines import Engine
from swamp_fast.engines.eager import EagerEngine
from swamp_fast.engines.fused.engine import FusedEngine, seconds_of_steps
from swamp_fast.problem import Problem
from swamp_fast.watch import Asked, Returned, Trained, Trainings, Watch, alone

TIMING_SECONDS = 10.0  # after which no further size is tried
WORSE = 1.03  # of the time of a lane: more runs are not taken at once then


def runs_at_once(engine: Engine, problems: Sequence[Problem]) -> tuple[int, str]:
    """How many runs that can share a step to train in one bank, by memory and by a stopwatch; and why."""
    if len(problems) == 1:
        return 1, "there is no other that could share a step"
    if not isinstance(engine, EagerEngine | FusedEngine) or not engine.joins:
        return 1, "this engine's program is made for one run's mask"
    particles = max(problems[0].config.particles_at(cycle) for cycle in range(problems[0].config.cycles + 1))
    runs, seconds = 1, seconds_of_steps(engine, problems[0], problems[0].mask, particles)
    alone, began = seconds, time.perf_counter()
    while runs < len(problems) and time.perf_counter() - began < TIMING_SECONDS:
        more = min(2 * runs, len(problems))
        try:
            taken = seconds_of_steps(engine, problems[0], problems[0].mask, more * particles)
        except torch.OutOfMemoryError:
            engine.release()
            break
        if taken > WORSE * seconds:
            break
        runs, seconds = more, min(taken, seconds)
    engine.release()
    return runs, f"a step takes {seconds * 1e3:.3g} ms a lane so, {alone * 1e3:.3g} ms one run at a time"


def packed(engine: Engine, every: Sequence[Trainings[Returned]]) -> list[Returned | Exception]:
    """Do the trainings of runs that can share a step; what each run returns, or the error that it ended with."""
    ended: dict[int, Returned | Exception] = {}
    asked: dict[int, Asked] = {}

    def go_on(number: int, advance: Callable[[], Asked]) -> None:
        try:
            asked[number] = advance()
        except StopIteration as end:
            ended[number] = end.value
        except Exception as error:
            ended[number] = error

    if isinstance(engine, EagerEngine | FusedEngine) and engine.joins:
        for number, run in enumerate(every):
            go_on(number, functools.partial(next, run))
        while asked:
            first = min(_place(each) for each in asked.values())  # a run that was stopped later waits for the others
            group = [number for number, each in asked.items() if _place(each) == first]
            answers = together(engine, [asked.pop(number) for number in group])
            for number, answer in zip(group, answers, strict=True):
                run = every[number]
                advance = run.throw if isinstance(answer, Exception) else run.send
                go_on(number, functools.partial(advance, answer))  # type: ignore[arg-type]
    else:
        for number, run in enumerate(every):
            try:
                ended[number] = alone(engine, run)
            except Exception as error:
                ended[number] = error
    return [ended[number] for number in range(len(every))]


def _place(asked: Asked) -> int:
    return -1 if asked.cycle is None else asked.cycle


def together(engine: EagerEngine | FusedEngine, asked: Sequence[Asked]) -> list[Trained | FloatingPointError]:
    """Trainings of several runs, of as many lanes and epochs, in one bank; a run that diverges ends with its error."""
    particles, configs = asked[0].particles, [each.run.config for each in asked]
    masks = torch.stack([each.mask for each in asked])
    bank = engine.spawn_runs([each.start for each in asked], masks, range(particles), asked[0].cycle, configs)
    watches = [
        Watch(each, bank.of_run(number), functools.partial(engine.state, number)) for number, each in enumerate(asked)
    ]
    errors: dict[int, FloatingPointError] = {}

    def on_step(step: int) -> None:
        for number, watch in enumerate(watches):
            if number not in errors:
                watch.on_step(step)
        for each in asked:
            each.run.stop_if_asked()

    def on_epoch(epoch: int, losses: Tensor) -> None:
        for number, own in enumerate(losses.split(particles)):
            try:
                if number not in errors:
                    watches[number].on_epoch(epoch, own)
            except FloatingPointError as error:
                errors[number] = error

    for each in asked:
        each.run.keep_engine(engine.describe())
    trainings = [each.training for each in asked]
    losses = engine.train_runs(bank, trainings, on_step, on_epoch, _states(watches))
    for number, watch in enumerate(watches):
        watch.bank.buffers = bank.of_run(number).buffers
    ends = enumerate(zip(watches, losses.split(particles), strict=True))
    return [
        errors.get(number) or watch.trained(own, functools.partial(engine.side_by_side, run=number), len(asked))
        for number, (watch, own) in ends
    ]


def _states(watches: Sequence[Watch]) -> list[dict[str, Tensor]] | None:
    """What the runs' folders hold of the training, if it is of one step; else they begin anew."""
    found = [watch.state_before for watch in watches if watch.state_before is not None]
    if len(found) == len(watches) and len({int(state["done"]) for state in found}) == 1:
        return found
    for watch in watches:
        watch.dropped.clear()
    return None
