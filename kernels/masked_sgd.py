"""masked_sgd_: one SGD step of all lanes in one launch. Each mask is read once for all lanes of its run."""

import torch
import triton
import triton.language as tl

from .argument_groups import rows, segments_of
from .segments import rate_of_columns, segments_of_block

BLOCK = 1024


@triton.jit(do_not_specialize=["lanes"])
def masked_sgd_kernel(
    weights, grads, momentum_buffer, swa, masks, run_of_lane_ptr,
    lr_ptr, momentum_ptr, weight_decay_ptr, grad_scale_ptr, swa_weight_ptr,
    lanes, parameters, prunable, segments, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take one step of SGD with momentum and coupled weight decay in place, then update the SWA running mean.

        g    = grad_scale * grads + weight_decay * w
        v    = mask * (momentum * v + g)
        w    = mask * (w - lr * v), or mask * (w - lr * (g + momentum * v)) if NESTEROV
        swa += (w - swa) * swa_weight

    weights           Rows [L, P]  w, changed
    grads             Rows [L, P]
    momentum_buffer   Rows [L, P]  v, changed
    swa               Rows [L, P]  changed, or None
    masks             Rows [R, Q]  bool; parameters Q … P have no mask
    run_of_lane_ptr   [L]          int64
    lr_ptr, weight_decay_ptr  [L, S]  float64
    momentum_ptr      [L]          float64
    grad_scale_ptr    [L]          float64, or None for 1
    swa_weight_ptr    [L]          float64, 0 leaves a lane's running mean unchanged; None without swa
    segments          Segments     [R, S]; None for one segment, S = 1

    Grid: blocks of parameters.
    Source: torch.optim.SGD, and Izmailov et al. 2018, arXiv 1803.05407, as in swamp_fast/ops/reference/masked_sgd.py.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCK
    columns = block + tl.arange(0, BLOCK)
    inside = columns < parameters
    has_mask = columns < prunable
    # Pointers to the rows of the current lane.
    weights_ptr, grads_ptr, buffer_ptr = weights.ptr, grads.ptr, momentum_buffer.ptr
    if swa is not None:
        swa_ptr = swa.ptr
    run = tl.full((), -1, tl.int64)
    keep = has_mask
    first_segment, last_segment = 0, 0
    for lane in range(lanes):
        # Read the mask only when the run changes. Lanes of a run are adjacent, so each mask is read once.
        lane_run = tl.load(run_of_lane_ptr + lane)
        if lane_run != run:
            run = lane_run
            loaded = tl.load(masks.ptr + run * masks.stride + columns, mask=has_mask, other=1)
            keep = (loaded != 0) & inside
            if segments is not None:
                first_segment, last_segment = segments_of_block(segments, run, block, block + BLOCK)
        w = tl.load(weights_ptr + columns, mask=inside)
        g = tl.load(grads_ptr + columns, mask=inside)
        buffer = tl.load(buffer_ptr + columns, mask=inside)
        mu = tl.load(momentum_ptr + lane).to(w.dtype)
        # Scale the gradient and add the weight decay. The sum has two products, g * scale and w * weight_decay. Without
        # an explicit fma the compiler could fuse either one.
        if grad_scale_ptr is not None:
            g *= tl.load(grad_scale_ptr + lane).to(w.dtype)
        decay = rate_of_columns(weight_decay_ptr, lane, columns, run, first_segment, last_segment, segments, w.dtype)
        step = tl.fma(w, decay, g)
        # Update the momentum, then the weights.
        buffer = tl.where(keep, buffer * mu + step, 0.0)
        if NESTEROV:
            step = step + buffer * mu
        else:
            step = buffer
        rate = rate_of_columns(lr_ptr, lane, columns, run, first_segment, last_segment, segments, w.dtype)
        w = tl.where(keep, w - step * rate, 0.0)
        tl.store(buffer_ptr + columns, buffer, mask=inside)
        tl.store(weights_ptr + columns, w, mask=inside)
        # Update the running mean. Outside the SWA phase it is neither read nor written.
        if swa is not None:
            sample_weight = tl.load(swa_weight_ptr + lane).to(w.dtype)
            if sample_weight != 0:
                mean = tl.load(swa_ptr + columns, mask=inside)
                tl.store(swa_ptr + columns, mean + (w - mean) * sample_weight, mask=inside)
            swa_ptr += swa.stride
        weights_ptr += weights.stride
        grads_ptr += grads.stride
        buffer_ptr += momentum_buffer.stride


def masked_sgd_(
    weights, grads, momentum_buffer, masks, run_of_lane,
    lr, momentum, weight_decay, nesterov, grad_scale, swa, swa_weight, segment_ends,
):  # fmt: skip
    """Take the step; arguments as in swamp_fast/ops/masked_sgd.py."""
    lanes, parameters = weights.shape
    segments = segments_of(segment_ends)
    with torch.cuda.device_of(weights):
        masked_sgd_kernel[(triton.cdiv(parameters, BLOCK),)](
            *(rows(weights), rows(grads), rows(momentum_buffer), rows(swa), rows(masks), run_of_lane),
            *(lr, momentum, weight_decay, grad_scale, swa_weight),
            *(lanes, parameters, masks.shape[1], segments),
            NESTEROV=nesterov,
            BLOCK=BLOCK,
            num_warps=4 if segments is None else 8,  # with segments, 4 warps would spill registers with Triton 3.9
            enable_fp_fusion=True,
        )
