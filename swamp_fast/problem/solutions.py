"""Converts between Solutions and the named parameters and buffers of the user's model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from swamp_fast.particles.bank import Solution
from swamp_fast.problem.problem import Problem


def initial(problem: Problem) -> Solution:
    """Return the user's model, as it was given, as a Solution."""
    weights = problem.layout.flat(dict(problem.template.named_parameters()), problem.dtype, problem.device)
    return Solution(weights, {name: buffer.detach().clone() for name, buffer in problem.template.named_buffers()})


def solution_of(problem: Problem, state: Mapping[str, Tensor]) -> Solution:
    """Return a Solution on the device from named parameters and buffers."""
    buffers = {name: state[name].to(problem.device, copy=True) for name, _ in problem.template.named_buffers()}
    return Solution(problem.layout.flat(state, problem.dtype, problem.device), buffers)


def state_of(problem: Problem, solution: Solution) -> dict[str, Tensor]:
    """Return a Solution's parameters and buffers by name, including the model's frozen parameters."""
    frozen = {name: p for name, p in problem.template.named_parameters() if not p.requires_grad}
    return {**frozen, **problem.layout.views(solution.weights), **solution.buffers}
