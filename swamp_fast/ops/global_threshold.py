"""global_threshold: the exact global magnitude threshold of every run, and the resulting mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swamp_fast.ops.contracts import FLOATS, Contract, native, register, triton_kernels


def global_threshold(weights: Tensor, masks: Tensor, keep: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
    """For every run, keep the `keep` largest |w| among the weights that its mask keeps; ties go to the lowest index.

    The threshold is found by a radix select over the bits of |w|, with one small histogram per pass. No weights are
    sorted or copied.

    weights  [R, Q]  float32 or float64; the row stride may exceed Q
    masks    [R, Q]  bool, False for weights that are pruned already
    keep     [R]     int64 tensor or integers, from 0 to the number of weights that the mask keeps

    Returns the thresholds [R], in the dtype of weights, and the new masks [R, Q] bool. A threshold is the smallest |w|
    that was kept, or infinity if keep is 0. A new mask has exactly `keep` entries that are True. On a GPU, the call
    waits for the result once, to check it.
    Raises ValueError if a kept weight is NaN, or if `keep` is negative or too large. Raises ValueError or TypeError if
    a shape, dtype or device is wrong.
    """
    c = Contract("global_threshold")
    c.tensor("weights", weights, "R Q", FLOATS, rows=True)
    c.tensor("masks", masks, "R Q", [torch.bool], rows=True)
    if not isinstance(keep, Tensor):
        keep = torch.tensor(list(keep), dtype=torch.int64, device=weights.device)
    c.tensor("keep", keep, "R", [torch.int64], advice="One count per run.")
    if keep.device.type == "cpu" and bool((keep < 0).any()):
        raise c.fail(f"`keep` must be at least 0, got {keep.tolist()}.")
    thresholds, new_masks, verdict = torch.ops.swamp_fast.global_threshold(weights, masks, keep)
    for run, (nans, kept, wanted) in enumerate(torch.cat([verdict, keep[:, None]], 1).tolist()):
        if wanted < 0:
            raise c.fail(f"`keep` must be at least 0, got {wanted} for run {run}.")
        if nans:
            raise c.fail(
                f"run {run} has NaN among the weights its mask keeps. The particles diverged: lower the learning rate."
            )
        if kept < wanted:
            raise c.fail(f"run {run} is to keep {wanted} weights, but its mask keeps only {kept}.")
    return thresholds, new_masks


def _cpu(weights: Tensor, masks: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    thresholds, new_masks, verdict = _fake(weights, masks, keep)
    threads = torch.get_num_threads()
    kernel = native().global_threshold_float32 if weights.dtype == torch.float32 else native().global_threshold_float64
    kernel(
        *(weights.data_ptr(), weights.stride(0), masks.data_ptr(), masks.stride(0), keep.data_ptr()),
        *(thresholds.data_ptr(), new_masks.data_ptr(), new_masks.stride(0), verdict.data_ptr()),
        *(weights.shape[0], weights.shape[1], threads),
    )
    return thresholds, new_masks, verdict


def _cuda(weights: Tensor, masks: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = triton_kernels("global_threshold").global_threshold(weights, masks, keep)
    return result


def _fake(weights: Tensor, masks: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    runs = weights.shape[0]
    return weights.new_empty(runs), masks.new_empty(masks.shape), keep.new_empty((runs, 2))


register(
    "global_threshold(Tensor weights, Tensor masks, Tensor keep) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
