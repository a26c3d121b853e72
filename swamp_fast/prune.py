"""Which weights a cycle keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swamp_fast import ops
from swamp_fast.data.streams import layer_order
from swamp_fast.layout import Layout


def kept_after(kept: int, prune: float) -> int:
    """How many of `kept` weights the next cycle keeps."""
    return round((1 - prune) * kept)


def check_cycles(kept: int, prune: float, cycles: int) -> None:
    """Refuse, before anything runs, more cycles than the weights allow."""
    left = kept
    for cycle in range(1, cycles + 1):
        before, left = left, kept_after(left, prune)
        if left < 1 or left == before:
            what = "nothing would be left to keep" if left < 1 else f"nothing would be pruned of {before}"
            raise ValueError(
                f"{cycles} cycles at prune = {prune} are more than {kept} weights allow: in cycle {cycle} {what}. "
                f"Ask for at most {cycle - 1} cycles."
            )


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


def by_layer(layout: Layout, mask: Tensor) -> list[int]:
    """How many weights of each prunable parameter a mask [Q] keeps."""
    return [int(mask[entry.begin : entry.end].sum()) for entry in layout.prunable]


def check_layers(layout: Layout, mask: Tensor, layer_kept: Sequence[Sequence[int]]) -> None:
    """Refuse numbers of weights by cycle and layer that can't be kept of a mask [Q], one cycle after the other."""
    before = by_layer(layout, mask)
    for cycle, kept in enumerate(layer_kept, 1):
        if len(kept) != len(before) or not sum(kept) or any(not 0 <= k <= b for k, b in zip(kept, before, strict=True)):
            raise ValueError(
                f"`layer_kept`: cycle {cycle} has {list(kept)}, and needs for each of {len(before)} prunable "
                f"parameters at most as many as are left of it, {before}."
            )
        before = list(kept)


def drawn(layout: Layout, kept: Sequence[int], mask: Tensor, seed: int, cycle: int) -> Tensor:
    """A mask [Q] that keeps so many of each layer, drawn among those that `mask` [Q] keeps."""
    found = torch.zeros_like(mask)
    for layer, (entry, count) in enumerate(zip(layout.prunable, kept, strict=True)):
        own = slice(entry.begin, entry.end)
        order = layer_order(seed, cycle, layer, entry.size, mask.device)
        found[own][order[mask[own][order]][:count]] = True
    return found
