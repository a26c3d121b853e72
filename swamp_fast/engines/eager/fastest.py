"""Which execution mode can run a model, and which takes the least time by a stopwatch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from swamp_fast.common.timing import seconds_in_turn, seconds_of
from swamp_fast.engines.eager.check import (
    differs_at_full_size,
    roughly_close,
    why_not_channels_last,
    why_not_fold,
)
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.engine import eager_trainer, lane_runner
from swamp_fast.engines.trainer import Trainer, first_handle
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.solutions import initial

ROUNDS = 5  # of timed steps
MAX_SECONDS = 3.0  # of timing, after which no further round begins
MIN_GAIN = 0.97  # a choice is preferred to an earlier one if it takes less than this fraction of its time
GIVE_UP_RATIO = 2.0  # a choice whose first step takes more than this multiple of the first choice's is timed no further


def fastest_choice(problem: Problem, particles: int) -> Choice:
    """The fastest way to run the lanes of those that pass the self-checks, timed on the problem's own data."""
    lanes = min(particles, 2 if problem.device.type == "cpu" else 8)
    milliseconds: dict[str, float] = {}
    formats = (False, True) if problem.probe.convolves and why_not_channels_last(problem) is None else (False,)
    alone = best = _fastest(problem, [Choice("lanes", last, "", {}) for last in formats], 1, milliseconds)
    why_not_folds = {way: why_not_fold(problem, way == "fold_grouped") for way in ("fold", "fold_grouped")}
    folds = [Choice(way, alone.channels_last, "", {}) for way, reason in why_not_folds.items() if reason is None]
    if folds and lanes > 1:
        best = _fastest(problem, [alone, *folds], lanes, milliseconds)
        reason = _why_not_at_full_size(problem, best, particles)
        if reason is not None:
            why_not_folds["fold"], best = f"folded, {reason}", alone
    if why_not_folds["fold"] is not None:
        why = f"it can't be folded, {why_not_folds['fold']}"
    elif lanes == 1:
        why = "there is one particle"
    else:
        why = "the fastest measured"
    return Choice(best.way, best.channels_last, why, milliseconds)


def why_not(problem: Problem, choice: Choice, particles: int) -> str | None:
    """Why the lanes can't run as a choice says; None if they can."""
    reason = why_not_channels_last(problem) if choice.channels_last else None
    if reason is None and choice.way != "lanes":
        reason = why_not_fold(problem, choice.way == "fold_grouped")
    return _why_not_at_full_size(problem, choice, particles) if reason is None else reason


def _why_not_at_full_size(problem: Problem, choice: Choice, particles: int) -> str | None:
    if choice.way == "lanes":
        return None
    return differs_at_full_size(problem, partial(lane_runner, problem, choice), particles)


def _fastest(problem: Problem, choices: list[Choice], lanes: int, milliseconds: dict[str, float]) -> Choice:
    """The choice whose step has the least median time; a later one only if it gains enough over an earlier.

    milliseconds  gets each choice's time of a particle's step
    """
    if len(choices) == 1:
        return choices[0]
    trainers = [_ready_trainer(problem, choice, lanes) for choice in choices]
    steps = [partial(trainer.step, first_handle(problem, trainer.bank)) for trainer in trainers]
    seconds, worth_timing = _first_steps(problem, trainers, steps)
    timed = seconds_in_turn([steps[place] for place in worth_timing], problem.device, ROUNDS, MAX_SECONDS)
    seconds |= {place: statistics.median(taken) for place, taken in zip(worth_timing, timed, strict=True)}
    best = 0
    for place, choice in enumerate(choices):
        name = f"{choice.way}, channels {'last' if choice.channels_last else 'first'}, {lanes} at a time"
        milliseconds[name] = round(seconds[place] / lanes * 1e3, 4)
        if place in worth_timing and seconds[place] < MIN_GAIN * seconds[best]:
            best = place
    return choices[best]


def _ready_trainer(problem: Problem, choice: Choice, lanes: int) -> Trainer:
    """A trainer that holds the problem's initial weights and has not taken a step."""
    trainer = eager_trainer(problem, choice, lanes)
    trainer.bank.rewind_([initial(problem)], problem.mask[None], range(lanes), None)
    trainer.begin()
    trainer.lr.fill_(problem.config.initial_lr)
    return trainer


def _first_steps(
    problem: Problem, trainers: Sequence[Trainer], steps: Sequence[Callable[[], None]]
) -> tuple[dict[int, float], list[int]]:
    """Seconds of each one's first step, which warms it up, and the places of those that are worth timing.

    Not worth timing are steps that raise, that give other gradients than the first one's, or that are far slower.
    """
    seconds, worth_timing = {0: seconds_of(steps[0], problem.device)}, [0]
    for place in range(1, len(steps)):
        try:
            seconds[place] = seconds_of(steps[place], problem.device)
            agrees = roughly_close(problem, trainers[place].grads, trainers[0].grads)
        except Exception:  # for one, a view that is impossible with channels last
            seconds[place], agrees = math.inf, False
        if agrees and seconds[place] <= GIVE_UP_RATIO * seconds[0]:
            worth_timing.append(place)
    return seconds, worth_timing
