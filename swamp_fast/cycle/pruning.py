"""Which weights a cycle keeps: the largest by one global threshold, of the average or of a score over the particles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swamp_fast import ops
from swamp_fast.cycle.training import Particles
from swamp_fast.particles.layout import Layout, by_layer
from swamp_fast.particles.random import layer_order
from swamp_fast.particles.schedule import kept_after
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.record import Run, first_rank_decides


@first_rank_decides
def next_mask(problem: Problem, run: Run, mask: Tensor, cycle: int) -> Tensor:
    """The mask [Q] of a cycle, from the mask and the solution of the cycle before."""
    ranked = problem.layout.flat(run.masks_source().ranked, problem.dtype, problem.device)
    largest = pruned(ranked[None], mask[None], problem.config.prune)[0]
    if problem.config.mask_score != "random":
        return largest
    layer_kept = problem.config.layer_kept
    kept = by_layer(problem.layout, largest) if layer_kept is None else layer_kept[cycle - 1]
    return random_mask(problem.layout, kept, mask, problem.config.seed, cycle)


@first_rank_decides
def mask_score(problem: Problem, run: Run, particles: Particles, cycle: int) -> dict[str, Tensor]:
    """What later masks rank instead of this cycle's average, by parameter; empty where they rank the average.

    Raises FloatingPointError if one particle is left, which has no signal-to-noise ratio.
    """
    config = problem.config
    if not config.scored_at(cycle):
        return {}
    if config.mask_score == "signal-to-noise" and len(particles.left) == 1:
        raise FloatingPointError(
            f'cycle {cycle}: one particle is left, which has no spread for mask_score="signal-to-noise". Lower lr and '
            "swa_lr so that fewer diverge, or take more particles."
        )
    weights = [particles.weights[lane, : problem.layout.Q] for lane in particles.left]
    return problem.layout.mask_views(particles_score(config.mask_score, weights))


def pruned(average: Tensor, masks: Tensor, prune: float) -> Tensor:
    """The masks [R, Q] that keep the largest of the averages [R, P], by one global threshold per run."""
    keep = [kept_after(kept, prune) for kept in masks.sum(1).tolist()]
    return ops.global_threshold(average[:, : masks.shape[1]], masks, keep)[1]


def particles_score(score: str, particles: Sequence[Tensor]) -> Tensor:
    """The score [Q] of N particles [Q] each that the global threshold ranks; `score` is SwampConfig's mask_score."""

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
        # The mean of equal numbers may differ from them in the last bit.
        agree = mean(lambda particle: (particle != particles[0]).double()) == 0
        found = (middle.abs() / spread.masked_fill(agree, 0.0)).nan_to_num(nan=0.0, posinf=torch.inf)
    return found.to(particles[0].dtype)


def random_mask(layout: Layout, kept: Sequence[int], mask: Tensor, seed: int, cycle: int) -> Tensor:
    """A mask [Q] that keeps `kept` weights of each layer, drawn at random among those that `mask` [Q] keeps."""
    chosen = torch.zeros_like(mask)
    for layer, (entry, count) in enumerate(zip(layout.prunable, kept, strict=True)):
        span = slice(entry.begin, entry.end)
        order = layer_order(seed, cycle, layer, entry.size, mask.device)
        chosen[span][order[mask[span][order]][:count]] = True
    return chosen
