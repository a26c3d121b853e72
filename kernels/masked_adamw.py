"""masked_adamw_: one AdamW step of all lanes in one launch. Each mask is read once for all lanes of its run."""

import torch
import triton
import triton.language as tl

from .argument_groups import rows, segments_of
from .segments import segments_of_block

BLOCK = 512


@triton.jit(do_not_specialize=["lanes"])
def masked_adamw_kernel(
    weights, grads, exp_avg, exp_avg_sq, swa, masks, run_of_lane_ptr,
    lr_ptr, beta1_ptr, beta2_ptr, eps_ptr, weight_decay_ptr, correction1_ptr, correction2_ptr,
    grad_scale_ptr, swa_weight_ptr, lanes, parameters, prunable, segments, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take one AdamW step in place, then update the SWA running mean.

        g    = grad_scale * grads
        m    = mask * (m + (g - m) * (1 - beta1))
        v    = mask * (beta2 * v + (1 - beta2) * g^2)
        w    = mask * (w * (1 - lr * weight_decay) - lr / correction1 * m / (sqrt(v) / sqrt(correction2) + eps))
        swa += (w - swa) * swa_weight

    weights           Rows [L, P]  w, changed
    grads             Rows [L, P]
    exp_avg           Rows [L, P]  m, changed
    exp_avg_sq        Rows [L, P]  v, changed
    swa               Rows [L, P]  changed, or None
    masks             Rows [R, Q]  bool; parameters Q … P have no mask
    run_of_lane_ptr   [L]          int64
    lr_ptr, weight_decay_ptr  [L, S]  float64
    beta1_ptr, beta2_ptr, eps_ptr  [L]  float64
    correction1_ptr   [L]          float64, 1 - beta1^step
    correction2_ptr   [L]          float64, 1 - beta2^step
    grad_scale_ptr    [L]          float64, or None for 1
    swa_weight_ptr    [L]          float64, 0 leaves a lane's running mean unchanged; None without swa
    segments          Segments     [R, S]; None for one segment, S = 1

    Grid: blocks of parameters.
    Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, as in swamp_fast/ops/reference/masked_adamw.py.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCK
    columns = block + tl.arange(0, BLOCK)
    inside = columns < parameters
    has_mask = columns < prunable
    # Pointers to the rows of the current lane.
    weights_ptr, grads_ptr, mean_ptr, square_ptr = weights.ptr, grads.ptr, exp_avg.ptr, exp_avg_sq.ptr
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
        mean = tl.load(mean_ptr + columns, mask=inside)
        square = tl.load(square_ptr + columns, mask=inside)
        if grad_scale_ptr is not None:
            g = g * tl.load(grad_scale_ptr + lane).to(w.dtype)
        place = lane if segments is None else lane * segments.number + first_segment
        rate, beta1, beta2 = tl.load(lr_ptr + place), tl.load(beta1_ptr + lane), tl.load(beta2_ptr + lane)
        # Update the moments.
        mean = tl.where(keep, mean + (g - mean) * (1 - beta1).to(w.dtype), 0.0)
        square = tl.where(keep, square * beta2.to(w.dtype) + g * g * (1 - beta2).to(w.dtype), 0.0)
        # Update the weights. As in torch, each rate is computed in float64 and then rounded once.
        root = tl.sqrt(square) / tl.sqrt(tl.load(correction2_ptr + lane)).to(w.dtype)
        correction1 = tl.load(correction1_ptr + lane)
        size = (rate / correction1).to(w.dtype)
        decay = (1 - rate * tl.load(weight_decay_ptr + place)).to(w.dtype)
        if segments is not None:
            size, decay = tl.zeros_like(w) + size, tl.zeros_like(w) + decay
            # Most blocks lie in one segment. In others, each further segment gives its rates to the columns after it.
            for number in range(first_segment, last_segment):
                later = columns >= tl.load(segments.ends_ptr + run * segments.number + number)
                rate = tl.load(lr_ptr + lane * segments.number + number + 1)
                factor = 1 - rate * tl.load(weight_decay_ptr + lane * segments.number + number + 1)
                size = tl.where(later, (rate / correction1).to(w.dtype), size)
                decay = tl.where(later, factor.to(w.dtype), decay)
        w = w * decay
        w = tl.where(keep, w - size * mean / (root + tl.load(eps_ptr + lane).to(w.dtype)), 0.0)
        tl.store(mean_ptr + columns, mean, mask=inside)
        tl.store(square_ptr + columns, square, mask=inside)
        tl.store(weights_ptr + columns, w, mask=inside)
        # Update the running mean. Outside the SWA phase it is neither read nor written.
        if swa is not None:
            sample_weight = tl.load(swa_weight_ptr + lane).to(w.dtype)
            if sample_weight != 0:
                average = tl.load(swa_ptr + columns, mask=inside)
                tl.store(swa_ptr + columns, average + (w - average) * sample_weight, mask=inside)
            swa_ptr += swa.stride
        weights_ptr += weights.stride
        grads_ptr += grads.stride
        mean_ptr += exp_avg.stride
        square_ptr += exp_avg_sq.stride


def masked_adamw_(
    weights, grads, exp_avg, exp_avg_sq, masks, run_of_lane,
    lr, beta1, beta2, eps, weight_decay, step, grad_scale, swa, swa_weight, segment_ends,
):  # fmt: skip
    """Take the step; arguments as in swamp_fast/ops/masked_adamw.py."""
    lanes, parameters = weights.shape
    with torch.cuda.device_of(weights):
        masked_adamw_kernel[(triton.cdiv(parameters, BLOCK),)](
            *(rows(weights), rows(grads), rows(exp_avg), rows(exp_avg_sq), rows(swa), rows(masks), run_of_lane),
            *(lr, beta1, beta2, eps, weight_decay, 1 - beta1**step, 1 - beta2**step, grad_scale, swa_weight),
            *(lanes, parameters, masks.shape[1], segments_of(segment_ends)),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
