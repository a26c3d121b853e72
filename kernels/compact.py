"""expand_weights and collect_gradients: between a compact bank and the dense weights that matrix products take."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def expand_weights_kernel(
    weights,  # [L, P']
    index,  # [R, T] int32, -1 where a weight is pruned
    run_of_lane,  # [L] int64
    out,  # [L, T]
    weights_stride,
    out_stride,
    size,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    where = tl.load(index + tl.load(run_of_lane + lane) * size + at, mask=inside, other=-1)
    value = tl.load(weights + lane * weights_stride + where, mask=where >= 0, other=0.0)
    tl.store(out + lane * out_stride + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def collect_gradients_kernel(
    partial,  # [L, ...] parts of dense gradients
    base,  # [R, P'] int32, or int64 in rows of 2^31 and more: where each weight's first part stands, -1 for none
    step,  # [R, P'] int32, how far the next is
    parts,  # [R, P'] int32, how many there are
    run_of_lane,  # [L] int64
    grads,  # [L, P'], added to
    partial_stride,
    grads_stride,
    size,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_run = tl.load(run_of_lane + lane) * size + at
    where = tl.load(base + of_run, mask=at < size, other=-1)
    there = where >= 0
    count = tl.load(parts + of_run, mask=there, other=0)
    far = tl.load(step + of_run, mask=there, other=0).to(where.dtype)  # all parts of a layer are a row's, so they fit
    total = tl.zeros((BLOCK,), grads.dtype.element_ty)
    for part in range(tl.max(count)):
        total += tl.load(partial + lane * partial_stride + where + part * far, mask=there & (part < count), other=0.0)
    place = grads + lane * grads_stride + at
    tl.store(place, tl.load(place, mask=there, other=0.0) + total, mask=there)


def expand_weights(weights, index, run_of_lane, out):
    """Launch out[l, t] = weights[l, index[run of l, t]], 0 where the index is -1, in the type of out."""
    size = index.shape[1]
    with torch.cuda.device_of(weights):
        expand_weights_kernel[(triton.cdiv(size, BLOCK), len(weights))](
            *(weights, index, run_of_lane, out, weights.stride(0), out.stride(0), size),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


def collect_gradients(partial, base, step, parts, run_of_lane, grads):
    """Launch the sum over the parts of each kept weight's gradient, in their order, onto grads."""
    size = base.shape[1]
    with torch.cuda.device_of(partial):
        collect_gradients_kernel[(triton.cdiv(size, BLOCK), len(grads))](
            *(partial, base, step, parts, run_of_lane, grads, partial.stride(0), grads.stride(0), size),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
