"""masked_sgd_: the step of all lanes in one launch; a mask is read once for all of them."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["lanes"])
def masked_sgd_kernel(
    weights,  # [L, P]
    grads,  # [L, P]
    momentum_buffer,  # [L, P]
    swa,  # [L, P], or weights again if not AVERAGE
    masks,  # [R, Q]
    run_of_lane,  # [L]
    lr,  # [L] float64, as the rates below
    momentum,
    weight_decay,
    grad_scale,  # [L], or lr again if not SCALED
    swa_weight,  # [L], or lr again if not AVERAGE
    weights_stride,
    grads_stride,
    momentum_stride,
    swa_stride,
    masks_stride,
    lanes,
    parameters,
    prunable,
    NESTEROV: tl.constexpr,
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
        buffer = tl.load(momentum_buffer + columns, mask=inside)
        mu = tl.load(momentum + lane).to(w.dtype)
        if SCALED:
            g *= tl.load(grad_scale + lane).to(w.dtype)
        step = tl.fma(w, tl.load(weight_decay + lane).to(w.dtype), g)  # else either product could be fused
        buffer = tl.where(keep, buffer * mu + step, 0.0)
        if NESTEROV:
            step = step + buffer * mu
        else:
            step = buffer
        w = tl.where(keep, w - step * tl.load(lr + lane).to(w.dtype), 0.0)
        tl.store(momentum_buffer + columns, buffer, mask=inside)
        tl.store(weights + columns, w, mask=inside)
        if AVERAGE:
            share = tl.load(swa_weight + lane).to(w.dtype)
            if share != 0:  # outside the SWA window the mean is neither read nor written
                mean = tl.load(swa + columns, mask=inside)
                tl.store(swa + columns, mean + (w - mean) * share, mask=inside)
            swa += swa_stride
        weights += weights_stride
        grads += grads_stride
        momentum_buffer += momentum_stride


def masked_sgd_(
    weights, grads, momentum_buffer, masks, run_of_lane,
    lr, momentum, weight_decay, nesterov, grad_scale, swa, swa_weight,
):  # fmt: skip
    """Launch the step; arguments as in swamp_fast/ops/masked_sgd.py."""
    lanes, parameters = weights.shape
    scaled, average = grad_scale is not None, swa is not None
    mean = swa if average else weights
    with torch.cuda.device_of(weights):
        masked_sgd_kernel[(triton.cdiv(parameters, BLOCK),)](
            *(weights, grads, momentum_buffer, mean, masks, run_of_lane),
            *(lr, momentum, weight_decay, grad_scale if scaled else lr, swa_weight if average else lr),
            *(weights.stride(0), grads.stride(0), momentum_buffer.stride(0), mean.stride(0), masks.stride(0)),
            *(lanes, parameters, masks.shape[1]),
            NESTEROV=nesterov,
            SCALED=scaled,
            AVERAGE=average,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
