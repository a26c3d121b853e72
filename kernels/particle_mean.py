"""particle_mean: the mean over the lanes of each run, summed in float64 in the order of the lanes."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["lanes"])
def particle_mean_kernel(
    weights,  # [L, P]
    run_of_lane,  # [L]
    mean,  # [R, P]
    weights_stride,
    mean_stride,
    lanes,
    parameters,
    BLOCK: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < parameters
    total = tl.zeros((BLOCK,), tl.float64)
    particles = 0.0
    for lane in range(lanes):
        if tl.load(run_of_lane + lane) == run:
            w = tl.load(weights + columns, mask=inside, other=0.0)
            total += w.to(tl.float64)
            particles += 1.0
        weights += weights_stride
    out = total / particles
    tl.store(mean + run * mean_stride + columns, out.to(mean.dtype.element_ty), mask=inside)


def particle_mean(weights, run_of_lane, runs):
    """Launch the mean; arguments as in swamp_fast/ops/particle_mean.py."""
    lanes, parameters = weights.shape
    mean = weights.new_empty((runs, parameters))
    with torch.cuda.device_of(weights):
        particle_mean_kernel[(triton.cdiv(parameters, BLOCK), runs)](
            *(weights, run_of_lane, mean, weights.stride(0), mean.stride(0), lanes, parameters),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return mean
