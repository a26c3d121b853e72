"""Which weights a cycle keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swamp_fast import ops
from swamp_fast.particles.layout import Layout
from swamp_fast.particles.random import layer_order
from swamp_fast.particles.schedule import kept_after


def pruned(average: Tensor, masks: Tensor, prune: float) -> Tensor:
    """The masks [R, Q] that keep the largest of the averages [R, P], by one global threshold a run."""
    keep = [kept_after(kept, prune) for kept in masks.sum(1).tolist()]
    return ops.global_threshold(average[:, : masks.shape[1]], masks, keep)[1]


def particles_score(mask_score: str, particles: Sequence[Tensor]) -> Tensor:
    """What the global threshold ranks instead of the average, [Q], of N particles [Q] each; see SwampConfig."""

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros_like(particles[0], dtype=torch.float64)
        for each in particles:
            total += of(each.double())
        return total / len(particles)

    if mask_score == "mean-abs":
        score = mean(torch.abs)
    elif mask_score == "rms":
        score = mean(torch.square).sqrt()
    else:
        middle = mean(torch.positive)
        spread = mean(lambda each: (each - middle).square()).sqrt()
        # The mean of equal numbers may differ from them in the last bit.
        agree = mean(lambda each: (each != particles[0]).double()) == 0
        score = (middle.abs() / spread.masked_fill(agree, 0.0)).nan_to_num(nan=0.0, posinf=torch.inf)
    return score.to(particles[0].dtype)


def drawn(layout: Layout, kept: Sequence[int], mask: Tensor, seed: int, cycle: int) -> Tensor:
    """A mask [Q] that keeps so many of each layer, drawn among those that `mask` [Q] keeps."""
    found = torch.zeros_like(mask)
    for layer, (entry, count) in enumerate(zip(layout.prunable, kept, strict=True)):
        own = slice(entry.begin, entry.end)
        order = layer_order(seed, cycle, layer, entry.size, mask.device)
        found[own][order[mask[own][order]][:count]] = True
    return found
