"""The reference of global_threshold."""

import torch
from torch import Tensor


def global_threshold(weights: Tensor, masks: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The thresholds [R] and new masks [R, Q] that keep each run's largest |w|.

    The arguments are those of swamp_fast/ops/global_threshold.py.
    """
    thresholds = torch.full_like(weights[:, 0], torch.inf)
    new_masks = torch.zeros_like(masks)
    for run, count in enumerate(keep.tolist()):
        if weights[run][masks[run]].isnan().any():
            raise ValueError(f"global_threshold: run {run} has NaN among the weights its mask keeps.")
        if count > int(masks[run].sum()):
            raise ValueError(f"global_threshold: run {run} is to keep {count} weights, but its mask keeps fewer.")
        magnitude = weights[run].abs().masked_fill(~masks[run], -1)
        order = magnitude.argsort(descending=True, stable=True)[:count]
        new_masks[run, order] = True
        if count:
            thresholds[run] = magnitude[order[-1]]
    return thresholds, new_masks
