"""The eager engine: autograd over the user's own forward, the lanes folded or one by one; any model, any device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.config import SwampConfig
from swamp_fast.engines.eager.check import differs_at_full_size, roughly, why_not_channels_last, why_not_fold
from swamp_fast.engines.eager.fold import Folded
from swamp_fast.engines.eager.lane_by_lane import LaneByLane
from swamp_fast.engines.selection import Choice
from swamp_fast.engines.trainer import BankEngine, LaneRunner, Trainer, first_handle
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.solutions import initial

ROUNDS = 5  # of timing
TIMING_SECONDS = 3.0  # after which no further round is begun
MIN_GAIN = 0.97  # a way must take less than this share of the one before it in the list to be preferred
GIVE_UP_RATIO = 2.0  # a way whose first step takes so many times the first way's is not timed again


class EagerEngine(BankEngine):
    """Trains a bank of particles and runs models side by side for evaluation."""

    kind = "eager"

    def __init__(self, problem: Problem, choice: Choice, why_not_fused: str | None = None) -> None:
        self.problem, self.choice, self.why_not_fused = problem, choice, why_not_fused
        self.why = f"{choice}" + (f"; not the fused engine: {why_not_fused}" if why_not_fused else "")
        self.trainer = None
        # On a CPU a folded lane's bits depend on how many stand beside it, and those of a run are to be its own.
        apart = choice.way != "lanes" and problem.device.type == "cpu"
        self.joins = not problem.probe.keeps_state and not apart
        self.evaluated: tuple[Tensor, LaneRunner] | None = None

    @property
    def name(self) -> str:
        """As in the setting `engine`."""
        return self.choice.name

    def spawn_runs(
        self,
        starts: Sequence[Solution],
        masks: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        configs: Sequence[SwampConfig],
    ) -> ParticleBank:
        """As BankEngine.spawn_runs; a bank's memory is used again each cycle."""
        lanes = len(starts) * len(particles)
        there = None if self.trainer is None else (self.trainer.bank.lanes, self.trainer.bank.configs)
        if self.trainer is None or there != (lanes, configs) or self.problem.probe.keeps_state:
            self.trainer = None  # frees the old bank before the new one is made
            self.trainer = eager_trainer(self.problem, self.choice, lanes, configs)
        self.trainer.bank.rewind_(starts, masks, particles, cycle)
        return self.trainer.bank

    def release(self) -> None:
        """Give the memory of training and evaluation back."""
        self.trainer = self.evaluated = None

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> LaneRunner:
        """Models of weights [M, P] and buffers [M, ...] of one run, in eval mode, to be run on the same inputs."""
        fits = self.evaluated is not None and self.evaluated[0].shape == weights.shape
        if not fits or self.problem.probe.keeps_state:
            self.evaluated = None
            mine = weights.clone()
            self.evaluated = (mine, make_way(self.problem, self.choice, mine, None, self._templates()))
        assert self.evaluated is not None
        mine, way = self.evaluated
        mine.copy_(weights)
        way.set_buffers(buffers)
        for module in way.modules:
            module.eval()
        return way

    def _templates(self) -> list[nn.Module] | None:
        """What models that keep state of their own are copies of: the trained particles, the average of the first."""
        if not self.problem.probe.keeps_state or self.trainer is None:
            return None
        return [*self.trainer.way.modules, self.trainer.way.modules[0]]

    def describe(self) -> dict[str, Any]:
        """What ran, how, and why."""
        why_not = self.trainer.not_captured if self.trainer is not None else "nothing was trained"
        return {
            "engine": self.kind,
            "name": self.name,
            **asdict(self.choice),
            "why_not_fused": self.why_not_fused,
            "cuda_graph": why_not is None,
            "no_cuda_graph": why_not,
        }

    def replay(self, there: dict[str, Any]) -> None:
        """As FusedEngine.replay: nothing is decided after the start."""


def make_way(
    problem: Problem,
    choice: Choice,
    weights: Tensor,
    grads: Tensor | None,
    templates: list[nn.Module] | None = None,
) -> LaneByLane | Folded:
    """Lanes over weights [L, P] as chosen; lane by lane they may be copies of `templates`."""
    if choice.way == "lanes":
        return LaneByLane(problem, weights, grads, choice.channels_last, templates)
    return Folded(problem, weights, grads, choice.channels_last, choice.way == "fold_grouped")


def eager_trainer(
    problem: Problem, choice: Choice, lanes: int, configs: Sequence[SwampConfig] | None = None
) -> Trainer:
    """A bank of so many lanes, of one run or of several, and the step over it."""
    bank = ParticleBank(problem.layout, configs or [problem.config], lanes, problem.dtype, problem.device)
    grads = torch.zeros_like(bank.weights)
    return Trainer(problem, bank, grads, make_way(problem, choice, bank.weights, grads))


def fastest_choice(problem: Problem, particles: int) -> Choice:
    """Prove which ways can run the model, time them on its own data, and take the fastest."""
    lanes = min(particles, 2 if problem.device.type == "cpu" else 8)
    milliseconds: dict[str, float] = {}
    formats = (False, True) if problem.probe.convolves and why_not_channels_last(problem) is None else (False,)
    best = _fastest(problem, [Choice("lanes", last, "", {}) for last in formats], 1, milliseconds)
    why_not = {way: why_not_fold(problem, way == "fold_grouped") for way in ("fold", "fold_grouped")}
    folds = [Choice(way, best.channels_last, "", {}) for way, reason in why_not.items() if reason is None]
    if folds and lanes > 1:
        alone = best
        best = _fastest(problem, [alone, *folds], lanes, milliseconds)
        if best.way != "lanes":
            folded = best
            reason = differs_at_full_size(problem, lambda w, g: make_way(problem, folded, w, g), particles)
            if reason is not None:
                why_not["fold"], best = f"folded, {reason}", alone
    if why_not["fold"] is not None:
        why = f"it can't be folded, {why_not['fold']}"
    elif lanes == 1:
        why = "there is one particle"
    else:
        why = "the fastest measured"
    return Choice(best.way, best.channels_last, why, milliseconds)


def why_not(problem: Problem, choice: Choice, particles: int) -> str | None:
    """Why the lanes can't run as a choice has it; None if they can."""
    reason = why_not_channels_last(problem) if choice.channels_last else None
    if reason is not None or choice.way == "lanes":
        return reason
    reason = why_not_fold(problem, choice.way == "fold_grouped")
    if reason is None:
        reason = differs_at_full_size(problem, lambda w, g: make_way(problem, choice, w, g), particles)
    return reason


def _fastest(problem: Problem, choices: list[Choice], lanes: int, milliseconds: dict[str, float]) -> Choice:
    """The choice with the least median time a particle-step; an earlier one unless a later is worth it."""
    if len(choices) == 1:
        return choices[0]
    start = initial(problem)
    trainers, steps = [], []
    for choice in choices:
        trainer = eager_trainer(problem, choice, lanes)
        trainer.bank.rewind_([start], problem.mask[None], range(lanes), None)
        trainer.way.set_buffers(trainer.bank.buffers)
        for module in trainer.way.modules:
            module.train()
        handle = first_handle(problem, trainer.bank)
        trainer.lr.fill_(problem.config.lr)
        trainers.append(trainer)
        steps.append(lambda trainer=trainer, handle=handle: trainer.step(handle))
    times, lost = [[_seconds(steps[0], problem.device)]], [False]
    for trainer, step in zip(trainers[1:], steps[1:], strict=True):
        try:
            times.append([_seconds(step, problem.device)])
            same = roughly(problem, trainer.grads, trainers[0].grads)
        except Exception:  # of a view that channels last doesn't have, for one
            times.append([math.inf])
            same = False
        lost.append(not same or times[-1][0] > GIVE_UP_RATIO * times[0][0])
    for taken, is_lost in zip(times, lost, strict=True):
        if not is_lost:
            taken.clear()  # the first step warms up
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for step, taken, is_lost in zip(steps, times, lost, strict=True):
            if not is_lost:
                taken.append(_seconds(step, problem.device))
        if time.perf_counter() - began > TIMING_SECONDS:
            break
    best, least = choices[0], statistics.median(times[0])
    for choice, taken, is_lost in zip(choices, times, lost, strict=True):
        median = statistics.median(taken)
        name = f"{choice.way}, channels {'last' if choice.channels_last else 'first'}, {lanes} at a time"
        milliseconds[name] = round(median / lanes * 1e3, 4)
        if not is_lost and median < MIN_GAIN * least:
            best, least = choice, median
    return best


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
