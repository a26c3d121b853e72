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
    buffers = {name: torch.cat([each, mean_buffer(each[lanes])[None]]) for name, each in particles.buffers.items()}
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
        best = val.best
        average, test, val = each[best], test and test.of(best), val.of(best)
    keeps = problem.config.keep_particles and cycle == problem.config.cycles
    average = Solution(average.weights.clone(), average.buffers)  # of its own: the models' memory is reused
    return Combined(average, each if keeps else [], score_row(test, val))


def mean_buffer(particles: Tensor) -> Tensor:
    """Return the average's value of a buffer from the particles' values [N, ...].

    It is their mean if the buffer is floating-point, and otherwise the first particle's value.
    """
    return particles.double().mean(0).to(particles.dtype) if particles.is_floating_point() else particles[0]


@torch.no_grad()
def reestimate(
    modules: list[nn.Module],
    run: Callable[[Any, int], object],
    data: Data,
    batch_size: int,
    channels_last: bool = False,
) -> None:
    """Set the running statistics to their mean over one pass through the data, weighted by the number of samples.

    With the running statistics of a particle, averaged weights would have chance accuracy. Only norm layers are put
    into train mode, so dropout stays off. If one forward pass calls a norm several times, each call counts as a batch.
    Leaves the modules in eval mode.

    run  run(inputs [B, ...], time) runs all modules on one batch
    """
    norms = norms_of(modules)
    momenta = [norm.momentum for norm in norms]
    for module in modules:
        module.eval()
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
                # For the fused engine, which uses a norm's momentum without calling the module, so without the hook.
                norm.momentum = count / seen
            run(inputs, evaluation_time(0, number))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
