"""How long a particle's step takes on an engine, by a stopwatch."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from swamp_fast.common.timing import seconds_in_turn
from swamp_fast.engines.bank_engine import BankEngine
from swamp_fast.engines.trainer import first_handle
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.solutions import initial

TIMED_STEPS = 3  # after one that warms up
MAX_TIMED_LANES = 8  # on CUDA, where lanes run side by side


def seconds_of_steps(engine: BankEngine, problem: Problem, mask: Tensor, lanes: int | None = None) -> float:
    """The least seconds of a particle's step under a mask [Q], with `lanes` lanes, by default `timed_lanes`."""
    lanes = lanes or timed_lanes(problem)
    bank = engine.spawn(initial(problem), mask, range(lanes), None)
    assert engine.trainer is not None
    engine.trainer.begin()
    step = partial(engine.trainer.step, first_handle(problem, bank))
    step()
    (seconds,) = seconds_in_turn([step], problem.device, TIMED_STEPS)
    return min(seconds) / lanes


def timed_lanes(problem: Problem) -> int:
    """How many lanes a timed step runs."""
    return min(most_particles(problem), MAX_TIMED_LANES) if problem.device.type == "cuda" else 1


def most_particles(problem: Problem) -> int:
    """The largest number of particles of any cycle."""
    return max(problem.config.particles_at(cycle) for cycle in range(problem.config.cycles + 1))
