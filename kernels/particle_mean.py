"""particle_mean: the mean over the lanes of each run, summed in float64 in the order of the lanes."""

import torch
import triton
import triton.language as tl

from .argument_groups import rows

BLOCK = 1024


@triton.jit(do_not_specialize=["lanes"])
def particle_mean_kernel(weights, run_of_lane_ptr, mean, lanes, parameters, BLOCK: tl.constexpr):
    """mean[r, p] = sum over the lanes l of run r of weights[l, p] / the number of these lanes.

    weights          Rows [L, P]
    run_of_lane_ptr  [L]          int64
    mean             Rows [R, P]  written

    Grid: blocks of parameters, R.
    Source: SWAMP, Choi et al. 2024, arXiv 2305.14852, algorithm 1, as in swamp_fast/ops/reference/particle_mean.py.
    """
    run = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < parameters
    weights_ptr = weights.ptr  # the row of the current lane
    total = tl.zeros((BLOCK,), tl.float64)
    particles = 0.0
    for lane in range(lanes):
        if tl.load(run_of_lane_ptr + lane) == run:
            w = tl.load(weights_ptr + columns, mask=inside, other=0.0)
            total += w.to(tl.float64)
            particles += 1.0
        weights_ptr += weights.stride
    out = total / particles
    tl.store(mean.ptr + run * mean.stride + columns, out.to(mean.ptr.dtype.element_ty), mask=inside)


def particle_mean(weights, run_of_lane, runs):
    """Compute the means [R, P]; arguments as in swamp_fast/ops/particle_mean.py."""
    lanes, parameters = weights.shape
    mean = weights.new_empty((runs, parameters))
    with torch.cuda.device_of(weights):
        particle_mean_kernel[(triton.cdiv(parameters, BLOCK), runs)](
            *(rows(weights), run_of_lane, rows(mean), lanes, parameters), BLOCK=BLOCK, enable_fp_fusion=False
        )
    return mean
