"""particle_mean: the mean over the particles of each run."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast.ops.contracts import FLOATS, Contract, native, register, triton_kernels


def particle_mean(weights: Tensor, run_of_lane: Tensor, runs: int) -> Tensor:
    """Average the lanes of each run. The lanes are summed in float64, in ascending order.

    weights      [L, P]  float32 or float64; the row stride may exceed P
    run_of_lane  [L]     int64, the run of each lane; every run must have a lane
    runs                 R

    Returns [R, P] in the dtype of weights. Raises ValueError or TypeError if a shape, dtype, device or value is wrong.
    Source: SWAMP, Choi et al. 2024, arXiv 2305.14852, algorithm 1.
    """
    c = Contract("particle_mean")
    c.tensor("weights", weights, "L P", FLOATS, rows=True)
    c.tensor("run_of_lane", run_of_lane, "L", [torch.int64])
    if runs < 1:
        raise c.fail(f"`runs` must be at least 1, got {runs}.")
    c.in_range("run_of_lane", run_of_lane, runs, "R")
    if run_of_lane.device.type == "cpu" and bool((torch.bincount(run_of_lane, minlength=runs) == 0).any()):
        raise c.fail(f"every run in [0, {runs}) must have a lane, got run_of_lane = {run_of_lane.tolist()}.")
    mean: Tensor = torch.ops.swamp_fast.particle_mean(weights, run_of_lane, runs)
    return mean


def _cpu(weights: Tensor, run_of_lane: Tensor, runs: int) -> Tensor:
    mean = _fake(weights, run_of_lane, runs)
    kernel = native().particle_mean_float32 if weights.dtype == torch.float32 else native().particle_mean_float64
    kernel(
        *(weights.data_ptr(), weights.stride(0), run_of_lane.data_ptr()),
        *(mean.data_ptr(), mean.stride(0)),
        *(weights.shape[0], weights.shape[1], runs, torch.get_num_threads()),
    )
    return mean


def _cuda(weights: Tensor, run_of_lane: Tensor, runs: int) -> Tensor:
    mean: Tensor = triton_kernels("particle_mean").particle_mean(weights, run_of_lane, runs)
    return mean


def _fake(weights: Tensor, run_of_lane: Tensor, runs: int) -> Tensor:
    return weights.new_empty((runs, weights.shape[1]))


register("particle_mean(Tensor weights, Tensor run_of_lane, int runs) -> Tensor", cpu=_cpu, cuda=_cuda, fake=_fake)
