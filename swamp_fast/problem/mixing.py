"""mixup and CutMix: a batch is mixed with a permutation of itself, and the losses with both targets are averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swamp_fast.common.format import dtype_name
from swamp_fast.common.tree import tensors, tree_leaves, tree_map
from swamp_fast.config import SwampConfig
from swamp_fast.particles.random import MIX, seeds_for


@dataclass(frozen=True)
class Mixed:
    """The targets of a mixed batch.

    A sample's loss is weight * loss(outputs, targets) + (1 - weight) * loss(outputs, others), as in the code of the
    papers. The targets themselves aren't mixed, so any loss can be used.
    """

    targets: Any
    others: Any
    weight: float


def mixes(config: SwampConfig) -> bool:
    """Whether batches are mixed."""
    return config.mixup > 0 or config.cutmix > 0


def mixed(inputs: Any, targets: Any, config: SwampConfig, key: Tensor) -> tuple[Any, Mixed]:
    """Mix one particle's batch with a permutation of itself. All draws come from the particle's step key [1, 3].

    inputs, targets  trees of tensors [B, ...]

    Sources: Zhang et al. 2018, arXiv 1710.09412, algorithm 1; Yun et al. 2019, arXiv 1905.04899, algorithm A1.
    """
    generator = np.random.default_rng(int(seeds_for(key, MIX)[0, 0]))
    cuts = config.cutmix > 0 and (config.mixup == 0 or generator.random() < 0.5)
    strength = config.cutmix if cuts else config.mixup
    weight = float(generator.beta(strength, strength))
    first = tensors(inputs)[0]
    permutation = torch.from_numpy(generator.permutation(len(first))).to(first.device)
    others = tree_map(lambda leaf: leaf[permutation], targets)
    if not cuts:
        inputs = tree_map(lambda leaf: weight * leaf + (1 - weight) * leaf[permutation], inputs)
        return inputs, Mixed(targets, others, weight)
    height, width = first.shape[2:]
    rows, columns = box_of(weight, height, width, generator)
    inputs = first.clone()
    inputs[..., rows, columns] = first[permutation][..., rows, columns]
    replaced = (rows.stop - rows.start) * (columns.stop - columns.start)
    return inputs, Mixed(targets, others, 1 - replaced / (height * width))


def box_of(weight: float, height: int, width: int, generator: np.random.Generator) -> tuple[slice, slice]:
    """Draw the rows and columns of a box with the fraction 1 - weight of a picture's area.

    The centre of the box is uniform in the picture. Each side is sqrt(1 - weight) times the picture's side, rounded
    down to an even number. The box is cut off at the picture's edges.
    """

    def side(length: int) -> slice:
        cut, centre = int(length * math.sqrt(1 - weight)), int(generator.integers(length))
        return slice(max(centre - cut // 2, 0), min(centre + cut // 2, length))

    return side(height), side(width)


def check_mixing(config: SwampConfig, inputs: Any, targets: Any, samples: int) -> None:
    """Raise ValueError for a batch that can't be mixed.

    inputs, targets  a batch of `samples` samples, after `transform`
    """
    if not mixes(config):
        return
    name = "mixup" if config.mixup > 0 else "cutmix"
    for kind, tree in (("input", inputs), ("target", targets)):
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != samples:
                got = list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(
                    f"`{name}` mixes the samples of a batch, so every {kind} must be a tensor [B, ...], here "
                    f"[{samples}, ...]; got {got}. Set {name}=0."
                )
    integers = [leaf for leaf in tensors(inputs) if not leaf.is_floating_point()]
    if config.mixup > 0 and integers:
        raise ValueError(
            f"`mixup` averages inputs, which must be floating-point; got {dtype_name(integers[0].dtype)} "
            f"{list(integers[0].shape)}. Set mixup=0, or mix in the model's `forward`."
        )
    if config.cutmix > 0 and not (isinstance(inputs, Tensor) and inputs.dim() == 4):
        got = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(
            f"`cutmix` replaces a box of pictures, so inputs must be one tensor [B, C, H, W]; got {got}. Set cutmix=0, "
            "or use `mixup`."
        )
