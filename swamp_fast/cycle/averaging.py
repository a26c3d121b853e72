"""Combines the particles of a cycle into their mean, or the best of them, and re-estimates BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast import ops
from swamp_fast.cycle.evaluation import evaluate, score_row
from swamp_fast.cycle.training import ModelsSideBySide, Particles
from swamp_fast.data.store import Data, pass_in_stored_order
from swamp_fast.particles.bank import Solution
from swamp_fast.particles.norms import norms_of
from swamp_fast.particles.random import at_time, evaluation_time
from swamp_fast.particles.spectral_norms import find_spectral_norms, spectral_vectors
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.record import Run, first_rank_decides


@dataclass(frozen=True)
class Combined:
    """The result of combining the particles of a cycle.

    average    the mean of the particles, or the best of them on validation data (combine="best")
    particles  the particles that did not diverge, each with its own re-estimated statistics; empty unless
               `keep_particles` is set and the cycle is the last one
    scores     the scores for the cycle's row in the history
    """

    average: Solution
    particles: list[Solution]
    scores: dict[str, Any]


@first_rank_decides
def combine(problem: Problem, run: Run, side_by_side: ModelsSideBySide, particles: Particles, cycle: int) -> Combined:
    """Average the particles, re-estimate BatchNorm statistics, and evaluate.

    The last two are done for the particles and for their average, which run side by side as lanes of the engine.
    """
    lanes = particles.left
    mean = ops.particle_mean(particles.weights[lanes], torch.zeros_like(particles.keys[lanes, 0]), 1)
    vectors = spectral_vectors(problem.template)
    buffers = {
        name: torch.cat([each, mean_buffer(each[lanes], of_spectral_norm=name in vectors)[None]])
        for name, each in particles.buffers.items()
    }
    stream_after_the_last = particles.keys[-1:] + particles.keys.new_tensor([0, 1, 0])
    keys = torch.cat([particles.keys, stream_after_the_last])
    models = side_by_side(torch.cat([particles.weights, mean]), buffers)

    def outputs(inputs: Any, time: int) -> list[Any]:
        every = models.outputs(inputs, at_time(keys, time))
        return [every[lane] for lane in (*lanes, -1)]

    reestimate(models.modules, outputs, problem.train, problem.config.batch_size, models.channels_last)
    test, val = evaluate(problem, outputs, models.channels_last)
    weights, after = models.weights, models.buffers()
    *each, average = (Solution(weights[i], {name: buffer[i] for name, buffer in after.items()}) for i in (*lanes, -1))
    if problem.config.combine == "best" and val is not None:
        best = val.best(problem)
        average, test, val = each[best], test and test.of(best), val.of(best)
    keeps = problem.config.keep_particles and cycle == problem.config.cycles
    average = Solution(average.weights.clone(), average.buffers)  # of its own: the models' memory is reused
    return Combined(average, each if keeps else [], score_row(problem, test, val))


def mean_buffer(particles: Tensor, of_spectral_norm: bool = False) -> Tensor:
    """Return the average's value of a buffer from the particles' values [N, ...].

    It is their mean if the buffer is floating-point. It is the first particle's value if the buffer is not, such as a
    counter, or if it is a vector of a spectral norm, from which `reestimate` finds that of the average's weights.
    """
    if of_spectral_norm or not particles.is_floating_point():
        return particles[0]
    mean = particles.double().mean(0).to(particles.dtype)
    return torch.where((particles == particles[0]).all(0), particles[0], mean)  # a mean of equal numbers may round


@torch.no_grad()
def reestimate(
    modules: list[nn.Module],
    run: Callable[[Any, int], object],
    data: Data,
    batch_size: int,
    channels_last: bool = False,
) -> None:
    """Set the running statistics to their mean over one pass through the data, weighted by the number of samples.

    Norms that the model's own `train()` leaves in evaluation mode keep their statistics. The vectors of spectral norms
    are found anew for the modules' weights. With the running statistics of a particle, averaged weights would have
    chance accuracy. Only norm layers are put into train mode, so dropout stays off. If one forward pass calls a norm
    several times, each call counts as a batch. Leaves the modules in eval mode.

    run  run(inputs [B, ...], time) runs all modules on one batch
    """
    norms = _norms_to_reestimate(modules)
    momenta = [norm.momentum for norm in norms]
    for module in modules:
        module.eval()
    find_spectral_norms(modules)
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen, count, seen_by = 0, 0, dict.fromkeys(norms, 0)

    def before_call(norm: Any, _: object) -> None:
        seen_by[norm] += count
        norm.momentum = count / seen_by[norm]

    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(before_call))
        for number, (inputs, _, count) in enumerate(pass_in_stored_order(data, batch_size, channels_last)):
            seen += count
            for norm in norms:
                # The hook does not run in the fused engine, which reads a norm's momentum but never calls the norm.
                norm.momentum = count / seen
            run(inputs, evaluation_time(0, number))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _norms_to_reestimate(modules: list[nn.Module]) -> list[Any]:
    """Return the norm layers that use the batch's statistics in train mode."""
    norms = norms_of(modules)
    for module in modules if norms else ():
        module.train()
    return [norm for norm in norms if norm.training]
