"""Finds the execution modes that can run a model, and measures which one is fastest."""

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

ROUNDS = 5  # rounds of timed steps; each round takes one step with every choice
MAX_SECONDS = 3.0  # no further round begins after this time
MIN_GAIN = 0.97  # a later choice must take less than this fraction of the best earlier choice's time
GIVE_UP_RATIO = (
    2.0  # a choice is timed no further if its first step takes longer than the first choice's by this factor
)


def fastest_choice(problem: Problem, particles: int) -> Choice:
    """The fastest of the choices that pass the self-checks, as measured on the problem's data."""
    lanes = min(particles, 2 if problem.device.type == "cpu" else 8)
    milliseconds: dict[str, float] = {}
    formats = (False, True) if problem.probe.convolves and why_not_channels_last(problem) is None else (False,)
    alone = best = _fastest(problem, [Choice("lanes", last, "", {}) for last in formats], 1, milliseconds)
    why_not_folds = {mode: why_not_fold(problem, mode == "fold_grouped") for mode in ("fold", "fold_grouped")}
    folds = [Choice(mode, alone.channels_last, "", {}) for mode, reason in why_not_folds.items() if reason is None]
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
    return Choice(best.mode, best.channels_last, why, milliseconds)


def why_not(problem: Problem, choice: Choice, particles: int) -> str | None:
    """The reason why the lanes can't run with a choice; None if they can."""
    reason = why_not_channels_last(problem) if choice.channels_last else None
    if reason is None and choice.mode != "lanes":
        reason = why_not_fold(problem, choice.mode == "fold_grouped")
    return _why_not_at_full_size(problem, choice, particles) if reason is None else reason


def _why_not_at_full_size(problem: Problem, choice: Choice, particles: int) -> str | None:
    if choice.mode == "lanes":
        return None
    return differs_at_full_size(problem, partial(lane_runner, problem, choice), particles)


def _fastest(problem: Problem, choices: list[Choice], lanes: int, milliseconds: dict[str, float]) -> Choice:
    """The choice whose step has the least median time. A later choice must beat an earlier one by MIN_GAIN.

    milliseconds  receives the time of a particle's step with each choice
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
        name = f"{choice.mode}, channels {'last' if choice.channels_last else 'first'}, {lanes} at a time"
        milliseconds[name] = round(seconds[place] / lanes * 1e3, 4)
        if place in worth_timing and seconds[place] < MIN_GAIN * seconds[best]:
            best = place
    return choices[best]


def _ready_trainer(problem: Problem, choice: Choice, lanes: int) -> Trainer:
    """A trainer with the problem's initial weights, ready for its first step."""
    trainer = eager_trainer(problem, choice, lanes)
    trainer.bank.rewind_([initial(problem)], problem.mask[None], range(lanes), None)
    trainer.begin()
    trainer.lr.fill_(problem.config.initial_lr)
    return trainer


def _first_steps(
    problem: Problem, trainers: Sequence[Trainer], steps: Sequence[Callable[[], None]]
) -> tuple[dict[int, float], list[int]]:
    """Take each trainer's first step, which warms it up.

    Returns the seconds of each step by its index, and the indices of the steps that are worth timing.

    A step is not worth timing if it raises, if its gradients differ from those of the first trainer, or if it takes
    more than GIVE_UP_RATIO times as long.
    """
    seconds, worth_timing = {0: seconds_of(steps[0], problem.device)}, [0]
    for place in range(1, len(steps)):
        try:
            seconds[place] = seconds_of(steps[place], problem.device)
            agrees = roughly_close(problem, trainers[place].grads, trainers[0].grads)
        except Exception:  # for example from a view that is impossible with channels last
            seconds[place], agrees = math.inf, False
        if agrees and seconds[place] <= GIVE_UP_RATIO * seconds[0]:
            worth_timing.append(place)
    return seconds, worth_timing
