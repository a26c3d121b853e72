"""Measures the time of a training step on an engine."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from swamp_fast.common.timing import seconds_in_turn
from swamp_fast.engines.bank_engine import BankEngine
from swamp_fast.engines.trainer import first_handle
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.solutions import initial

TIMED_STEPS = 3  # after one warm-up step
MAX_TIMED_LANES = 8  # on CUDA, where lanes run in parallel


def seconds_of_steps(engine: BankEngine, problem: Problem, mask: Tensor, lanes: int | None = None) -> float:
    """The least measured seconds of a step under a mask [Q], divided by the number of lanes.

    lanes  the number of lanes; None for `timed_lanes`
    """
    lanes = lanes or timed_lanes(problem)
    bank = engine.spawn(initial(problem), mask, range(lanes), None)
    assert engine.trainer is not None
    engine.trainer.begin()
    step = partial(engine.trainer.step, first_handle(problem, bank))
    step()
    (seconds,) = seconds_in_turn([step], problem.device, TIMED_STEPS)
    return min(seconds) / lanes


def timed_lanes(problem: Problem) -> int:
    """The number of lanes with which a step is timed."""
    return min(most_particles(problem), MAX_TIMED_LANES) if problem.device.type == "cuda" else 1


def most_particles(problem: Problem) -> int:
    """The largest number of particles in any cycle."""
    return max(problem.config.particles_at(cycle) for cycle in range(problem.config.cycles + 1))
