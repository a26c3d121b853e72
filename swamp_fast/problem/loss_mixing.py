"""Warns of a loss that mixes the samples of a batch, which is often caused by accidental broadcasting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.tree import tree_clone, tree_leaves, tree_map
from swamp_fast.common.warn import warn_user
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.random import generators_left_alone, seed_generators
from swamp_fast.problem.arguments import Loss
from swamp_fast.problem.shapes import shapes_of

TOLERANCE = 1e-4  # relative; larger for types of lower precision


def warn_if_mixed(loss: Loss, outputs: Any, targets: Any, others: Any, samples: int, keys: Tensor) -> None:
    """Warn if the loss of a sample depends on the other samples of its batch.

    The second half of the batch is replaced, and the losses of the first half must not change. If outputs and targets
    aren't trees of tensors [B, ...], nothing is tested.

    others  targets [B, ...] of other samples; they may differ even if all targets of the batch are equal
    keys    [1, 3]  the keys of the random draws, which are the same for both batches
    """
    leaves = list(tree_leaves((outputs, targets)))
    if samples < 2 or not all(isinstance(leaf, Tensor) and leaf.shape[:1] == (samples,) for leaf in leaves):
        return
    half = samples // 2

    def losses_of(outputs: Any, targets: Any) -> Tensor:
        seed_generators(0)
        with DropoutStream(keys):
            return loss(tree_clone(outputs), tree_clone(targets))[:half].detach()  # a loss may change its arguments

    def replaced(leaf: Tensor, other: Tensor) -> Tensor:
        return torch.cat([leaf[:half], other.flip(0)[half:]])

    with torch.no_grad(), generators_left_alone():
        whole = losses_of(outputs, targets)
        other = losses_of(tree_map(replaced, outputs, outputs), tree_map(replaced, targets, others))
    if not _close(whole, other):
        warn_user(
            f"`loss`: the loss of a sample changes with the other samples of its batch (outputs {shapes_of(outputs)}, "
            f"targets {shapes_of(targets)}, losses [{samples}]). A contrastive loss is meant to do that. Otherwise "
            "each output may be compared with every target, by broadcasting: give both the same shape, as with "
            "outputs.squeeze(1) or targets[:, None]."
        )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = max(TOLERANCE, 4 * torch.finfo(a.dtype).eps) if a.is_floating_point() else 0.0
    scale = float(a.abs().nan_to_num(posinf=0.0).max()) if a.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, tolerance, tolerance * scale, equal_nan=True)
