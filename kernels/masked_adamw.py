"""masked_adamw_: the step of all lanes in one launch; a mask is read once for all of them."""

import torch
import triton
import triton.language as tl

BLOCK = 512


@triton.jit(do_not_specialize=["lanes"])
def masked_adamw_kernel(
    weights,  # [L, P]
    grads,  # [L, P]
    exp_avg,  # [L, P]
    exp_avg_sq,  # [L, P]
    swa,  # [L, P], or weights again if not AVERAGE
    masks,  # [R, Q]
    run_of_lane,  # [L]
    lr,  # [L] float64, as the rates below
    beta1,
    beta2,
    eps,
    weight_decay,
    correction1,  # [L] 1 - beta1^step
    correction2,  # [L] 1 - beta2^step
    grad_scale,  # [L], or lr again if not SCALED
    swa_weight,  # [L], or lr again if not AVERAGE
    weights_stride,
    grads_stride,
    exp_avg_stride,
    exp_avg_sq_stride,
    swa_stride,
    masks_stride,
    lanes,
    parameters,
    prunable,
    SCALED: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < parameters
    has_mask = columns < prunable
    run = tl.full((), -1, tl.int64)
    keep = has_mask
    for lane in range(lanes):
        lane_run = tl.load(run_of_lane + lane)
        if lane_run != run:  # lanes of a run stand together, so this reads each mask once
            run = lane_run
            loaded = tl.load(masks + run * masks_stride + columns, mask=has_mask, other=1)
            keep = (loaded != 0) & inside
        w = tl.load(weights + columns, mask=inside)
        g = tl.load(grads + columns, mask=inside)
        mean = tl.load(exp_avg + columns, mask=inside)
        square = tl.load(exp_avg_sq + columns, mask=inside)
        if SCALED:
            g = g * tl.load(grad_scale + lane).to(w.dtype)
        rate, first, second = tl.load(lr + lane), tl.load(beta1 + lane), tl.load(beta2 + lane)
        mean = tl.where(keep, mean + (g - mean) * (1 - first).to(w.dtype), 0.0)
        square = tl.where(keep, square * second.to(w.dtype) + g * g * (1 - second).to(w.dtype), 0.0)
        root = tl.sqrt(square) / tl.sqrt(tl.load(correction2 + lane)).to(w.dtype)
        size = (rate / tl.load(correction1 + lane)).to(w.dtype)
        w = w * (1 - rate * tl.load(weight_decay + lane)).to(w.dtype)
        w = tl.where(keep, w - size * mean / (root + tl.load(eps + lane).to(w.dtype)), 0.0)
        tl.store(exp_avg + columns, mean, mask=inside)
        tl.store(exp_avg_sq + columns, square, mask=inside)
        tl.store(weights + columns, w, mask=inside)
        if AVERAGE:
            share = tl.load(swa_weight + lane).to(w.dtype)
            if share != 0:  # outside the SWA window the mean is neither read nor written
                average = tl.load(swa + columns, mask=inside)
                tl.store(swa + columns, average + (w - average) * share, mask=inside)
            swa += swa_stride
        weights += weights_stride
        grads += grads_stride
        exp_avg += exp_avg_stride
        exp_avg_sq += exp_avg_sq_stride


def masked_adamw_(
    weights, grads, exp_avg, exp_avg_sq, masks, run_of_lane,
    lr, beta1, beta2, eps, weight_decay, step, grad_scale, swa, swa_weight,
):  # fmt: skip
    """Launch the step; arguments as in swamp_fast/ops/masked_adamw.py."""
    lanes, parameters = weights.shape
    scaled, average = grad_scale is not None, swa is not None
    mean = swa if average else weights
    with torch.cuda.device_of(weights):
        masked_adamw_kernel[(triton.cdiv(parameters, BLOCK),)](
            *(weights, grads, exp_avg, exp_avg_sq, mean, masks, run_of_lane),
            *(lr, beta1, beta2, eps, weight_decay, 1 - beta1**step, 1 - beta2**step),
            *(grad_scale if scaled else lr, swa_weight if average else lr),
            *(each.stride(0) for each in (weights, grads, exp_avg, exp_avg_sq, mean, masks)),
            *(lanes, parameters, masks.shape[1]),
            SCALED=scaled,
            AVERAGE=average,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
