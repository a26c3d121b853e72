"""Chooses the weights that a cycle keeps, by one global threshold on the average or on a score over the particles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swamp_fast import ops
from swamp_fast.cycle.training import Particles
from swamp_fast.particles.layout import Layout, by_layer
from swamp_fast.particles.random import layer_order
from swamp_fast.particles.schedule import kept_at
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.record import Run, first_rank_decides


@first_rank_decides
def next_mask(problem: Problem, run: Run, mask: Tensor, cycle: int) -> Tensor:
    """Return the mask [Q] of a cycle.

    mask  [Q]  the mask of the cycle before; the new mask keeps a part of its weights
    """
    size = problem.layout.Q
    ranked = problem.layout.flat(run.masks_source().ranked, problem.dtype, problem.device)[:size]
    keep = kept_at(problem.config, cycle, int(mask.sum()), problem.layout.weights)
    largest = ops.global_threshold(ranked[None], mask[None], [keep])[1][0]
    if problem.config.mask_score != "random":
        return largest
    layer_kept = problem.config.layer_kept
    kept = by_layer(problem.layout, largest) if layer_kept is None else layer_kept[cycle - 1]
    return random_mask(problem.layout, kept, mask, problem.config.seed, cycle)


@first_rank_decides
def mask_score(problem: Problem, run: Run, particles: Particles, cycle: int) -> dict[str, Tensor]:
    """Return, by parameter name, the scores of the weights by which later masks rank them.

    Empty if later masks rank the weights of the average or don't use this cycle. Raises FloatingPointError if
    mask_score="signal-to-noise" and only one particle is left, because one particle has no spread.
    """
    config = problem.config
    if not problem.scored_at(cycle):
        return {}
    if config.mask_score == "signal-to-noise" and len(particles.left) == 1:
        if cycle == config.cycles:
            return {}  # no mask is made from the last cycle, unless the run is prolonged
        raise FloatingPointError(
            f'cycle {cycle}: only one particle is left, but mask_score="signal-to-noise" needs the spread of at least '
            "2. Lower lr and swa_lr so that fewer diverge, or take more particles."
        )
    weights = [particles.weights[lane, : problem.layout.Q] for lane in particles.left]
    if problem.recipe.score is None:
        return problem.layout.mask_views(particles_score(config.mask_score, weights))
    place = problem.layout.full_mask(problem.device)  # all but the padding
    score = torch.zeros_like(weights[0])
    try:
        score[place] = problem.recipe.scores(torch.stack(weights)[:, place])
    except (TypeError, ValueError):
        if cycle == config.cycles:
            return {}  # no mask is made from the last cycle, unless the run is prolonged
        raise
    return problem.layout.mask_views(score)


def particles_score(score: str, particles: Sequence[Tensor]) -> Tensor:
    """Return the score [Q] of each weight over N particles; `score` names it as SwampConfig.mask_score does.

    particles  N vectors [Q]
    """

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros_like(particles[0], dtype=torch.float64)
        for particle in particles:
            total += of(particle.double())
        return total / len(particles)

    if score == "mean-abs":
        found = mean(torch.abs)
    elif score == "rms":
        found = mean(torch.square).sqrt()
    else:
        middle = mean(torch.positive)
        spread = mean(lambda particle: (particle - middle).square()).sqrt()
        # If all particles agree on a weight, rounding of the mean may still give a small spread, so it is set to 0.
        agree = mean(lambda particle: (particle != particles[0]).double()) == 0
        found = (middle.abs() / spread.masked_fill(agree, 0.0)).nan_to_num(nan=0.0, posinf=torch.inf)
    return found.to(particles[0].dtype)


def random_mask(layout: Layout, kept: Sequence[int], mask: Tensor, seed: int, cycle: int) -> Tensor:
    """Draw a mask [Q] at random among the weights that `mask` [Q] keeps; `kept` has one number of weights per layer."""
    chosen = torch.zeros_like(mask)
    for layer, (entry, count) in enumerate(zip(layout.prunable, kept, strict=True)):
        span = slice(entry.begin, entry.end)
        order = layer_order(seed, cycle, layer, entry.size, mask.device)
        chosen[span][order[mask[span][order]][:count]] = True
    return chosen
