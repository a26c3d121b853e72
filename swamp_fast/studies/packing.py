"""Several runs at once: which can share a step, and their trainings of one cycle in one bank, where the engine can."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.fingerprint import model_fingerprint
from swamp_fast.common.timing import Stopwatch
from swamp_fast.cycle.training import Returned, TrainingOutcome, TrainingRequest, Trainings, Watch, alone
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.start import Engine
from swamp_fast.engines.step_time import seconds_of_steps
from swamp_fast.particles.norms import norms_of
from swamp_fast.particles.schedule import total_particle_epochs
from swamp_fast.problem.problem import Problem

TIMING_SECONDS = 10.0  # after which no further size is tried
MAX_SLOWDOWN = 1.03  # of the time of a lane: more runs are not taken at once then


# Settings that may differ between the runs of a pack: they are values of a lane, or of what is done between trainings.
PER_RUN = (
    *("seed", "lr", "swa_lr", "swa_start", "momentum", "beta1", "beta2", "adam_eps", "weight_decay", "swa", "schedule"),
    *("prune", "cycles", "target_density", "rewind", "combine", "mask_score", "mask_from", "layer_kept"),
)


def packs_of(problems: Sequence[Problem]) -> list[list[int]]:
    """Which runs can share a step, by their places: of the same model and settings, but for what a lane has of its own.

    That is its trained weights, running statistics, and the settings PER_RUN.
    """
    packs: dict[str, list[int]] = {}
    for place, problem in enumerate(problems):
        settings = {name: value for name, value in problem.config.identity().items() if name not in PER_RUN}
        if problem.config.clip_norm is not None:
            settings["clip_norm"] = "a value of a lane"
        model = model_fingerprint(problem.original, _of_a_lane(problem))
        others = {name: each for name, each in problem.fingerprints.items() if name not in ("model", "mask")}
        packs.setdefault(repr((settings, model, others)), []).append(place)
    return list(packs.values())


def _of_a_lane(problem: Problem) -> set[str]:
    """What a lane of a bank has of its own: trained parameters, and the running statistics of norms."""
    names = {entry.name for entry in problem.layout.entries}
    for path, module in problem.original.named_modules():
        if norms_of([module]) == [module]:
            names |= {f"{path}.{name}" for name, _ in module.named_buffers()}
    return names


@dataclass(frozen=True)
class Pack:
    """Runs that can share a step, by their numbers; the engine that they begin with, and how many it does at once."""

    numbers: list[int]
    engine: dict[str, Any]
    at_once: int


def dealt(packs: Sequence[Pack], problems: Sequence[Problem], world: int) -> list[list[Pack]]:
    """Each rank's part of the packs, so that all have about as much to train."""
    load = [0] * world
    parts: list[list[Pack]] = [[] for _ in range(world)]
    for pack in packs:
        numbers: list[list[int]] = [[] for _ in range(world)]
        for number in pack.numbers:
            rank = load.index(min(load))
            load[rank] += total_particle_epochs(problems[number].config) * len(problems[number].bounds)
            numbers[rank].append(number)
        for part, own in zip(parts, numbers, strict=True):
            if own:
                part.append(dataclasses.replace(pack, numbers=own))
    return parts


def runs_at_once(engine: Engine, problems: Sequence[Problem]) -> tuple[int, str]:
    """How many runs that can share a step to train in one bank, by memory and by a stopwatch; and why."""
    if len(problems) == 1:
        return 1, "there is no other that could share a step"
    if not isinstance(engine, EagerEngine | FusedEngine) or not engine.joins:
        return 1, "this engine's program is made for one run's mask"
    particles = max(problems[0].config.particles_at(cycle) for cycle in range(problems[0].config.cycles + 1))
    runs, seconds = 1, seconds_of_steps(engine, problems[0], problems[0].mask, particles)
    alone, watch = seconds, Stopwatch()
    while runs < len(problems) and watch.seconds < TIMING_SECONDS:
        more = min(2 * runs, len(problems))
        try:
            taken = seconds_of_steps(engine, problems[0], problems[0].mask, more * particles)
        except torch.OutOfMemoryError:
            engine.release()
            break
        if taken > MAX_SLOWDOWN * seconds:
            break
        runs, seconds = more, min(taken, seconds)
    engine.release()
    return runs, f"a step takes {seconds * 1e3:.3g} ms a lane so, {alone * 1e3:.3g} ms one run at a time"


def packed(engine: Engine, every: Sequence[Trainings[Returned]]) -> list[Returned | Exception]:
    """Do the trainings of runs that can share a step; what each run returns, or the error that it ended with.

    Runs that stand at the same step of the same cycle are trained together; one that is behind goes first.
    """
    ended: dict[int, Returned | Exception] = {}
    asked: dict[int, TrainingRequest] = {}
    apart: set[int] = set()  # those that are trained by themselves

    def go_on(number: int, advance: Callable[[], TrainingRequest]) -> None:
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
            _align(asked.values())
            first = min(_place(each) for each in asked.values())
            group = [number for number, each in asked.items() if _place(each) == first]
            group = [number for number in group if number in apart][:1] or group
            wanted = [asked.pop(number) for number in group]
            answers: Sequence[TrainingOutcome | Exception]
            try:
                answers = together(engine, wanted)
            except Exception as error:
                engine.release()
                if len(group) > 1:  # one of them may be at fault, or the memory doesn't do
                    apart.update(group)
                    asked.update(zip(group, wanted, strict=True))
                    continue
                answers = [error]
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


def _place(asked: TrainingRequest) -> tuple[int, int]:
    """The cycle, and the step that its folder has a checkpoint of."""
    kept = asked.run.checkpoint_of(asked.cycle)
    return -1 if asked.cycle is None else asked.cycle, 0 if kept is None else kept.steps


def _align(asked: Iterable[TrainingRequest]) -> None:
    """Where checkpoints of one training are of two steps, as after a kill between their writing, take the earlier."""
    least: dict[int | None, int] = {}
    for each in asked:
        if (kept := each.run.checkpoint_of(each.cycle)) is not None:
            least[each.cycle] = min(kept.steps, least.get(each.cycle, kept.steps))
    for each in asked:
        if each.cycle in least:
            each.run.go_back_to(least[each.cycle])


class _AllDiverged(Exception):
    """No run is left to train."""


def together(engine: EagerEngine | FusedEngine, asked: Sequence[TrainingRequest]) -> list[TrainingOutcome | Exception]:
    """Trainings of several runs, of as many lanes and epochs, in one bank; a run that diverges ends with its error."""
    for each in asked:
        each.run.begin_training()
    particles, configs = asked[0].particles, [each.run.config for each in asked]
    masks = torch.stack([each.mask for each in asked])
    bank = engine.spawn_runs([each.start for each in asked], masks, range(particles), asked[0].cycle, configs)
    watches = [
        Watch(each, bank.of_run(number), functools.partial(engine.state, number)) for number, each in enumerate(asked)
    ]
    errors: dict[int, Exception] = {}

    def on_step(step: int) -> None:
        left = [watch for number, watch in enumerate(watches) if number not in errors]
        due = [watch.on_step(step) for watch in left]
        if any(due):  # all are kept after the same step
            for watch in left:
                watch.keep()
        for each in asked:
            each.run.stop_if_asked()

    def on_epoch(epoch: int, losses: Tensor) -> None:
        for number, own in enumerate(losses.split(particles)):
            try:
                if number not in errors:
                    watches[number].on_epoch(epoch, own)
            except FloatingPointError as error:
                errors[number] = error
        if len(errors) == len(watches):
            raise _AllDiverged

    for each in asked:
        each.run.keep_engine(engine.describe())
    trainings = [each.training for each in asked]
    before = [watch.state_before for watch in watches if watch.state_before is not None]
    try:
        losses = engine.train_runs(bank, trainings, on_step, on_epoch, before or None)
    except _AllDiverged:
        return [errors[number] for number in range(len(watches))]
    for number, watch in enumerate(watches):
        watch.bank.buffers = bank.of_run(number).buffers
    ends = enumerate(zip(watches, losses.split(particles), strict=True))
    return [
        errors.get(number) or watch.outcome(own, functools.partial(engine.side_by_side, run=number), len(asked))
        for number, (watch, own) in ends
    ]
