"""expand_weights and collect_gradients: between a compact bank and the dense weights that matrix products take.

A compact bank [L, P'] holds a run's kept weights and its parameters without a mask; a dense row [T] holds the weights
of all convolutions, 0 where they are pruned (see swamp_fast/engines/fused/cuda/dense.py).
"""

import torch
import triton
import triton.language as tl

from .argument_groups import rows

BLOCK = 1024


@triton.jit
def expand_weights_kernel(weights, index_ptr, run_of_lane_ptr, out, size, BLOCK: tl.constexpr):
    """out[l, t] = weights[l, index[run of l, t]], or 0 where the index is -1.

    weights          Rows [L, P']
    index_ptr        [R, T]       int32, -1 for a pruned weight or padding
    run_of_lane_ptr  [L]          int64
    out              Rows [L, T]  written, in its own type
    size             T

    Grid: blocks of places, L.
    """
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    where = tl.load(index_ptr + tl.load(run_of_lane_ptr + lane) * size + at, mask=inside, other=-1)
    value = tl.load(weights.ptr + lane * weights.stride + where, mask=where >= 0, other=0.0)
    tl.store(out.ptr + lane * out.stride + at, value.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def collect_gradients_kernel(partial, base_ptr, step_ptr, parts_ptr, run_of_lane_ptr, grads, size, BLOCK: tl.constexpr):
    """grads[l, p] += sum over k < parts[p] of partial[l, base[p] + k * step[p]], the tables being those of l's run.

    partial          Rows [L, ...]  parts of the dense gradients
    base_ptr         [R, P']        where each weight's first part stands, -1 for none; int64 if rows reach 2^31
    step_ptr         [R, P']        int32, how far apart its parts are
    parts_ptr        [R, P']        int32, how many parts it has
    run_of_lane_ptr  [L]            int64
    grads            Rows [L, P']   added to
    size             P'

    Grid: blocks of weights, L.
    """
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(run_of_lane_ptr + lane) * size + at  # of the tables
    where = tl.load(base_ptr + entry, mask=at < size, other=-1)
    has_parts = where >= 0
    count = tl.load(parts_ptr + entry, mask=has_parts, other=0)
    # In the type of the base: every place lies in one row, so it fits.
    step = tl.load(step_ptr + entry, mask=has_parts, other=0).to(where.dtype)
    total = tl.zeros((BLOCK,), grads.ptr.dtype.element_ty)
    for part in range(tl.max(count)):
        part_ptr = partial.ptr + lane * partial.stride + where + part * step
        total += tl.load(part_ptr, mask=has_parts & (part < count), other=0.0)
    grads_ptr = grads.ptr + lane * grads.stride + at
    tl.store(grads_ptr, tl.load(grads_ptr, mask=has_parts, other=0.0) + total, mask=has_parts)


def expand_weights(weights, index, run_of_lane, out):
    """Launch out[l, t] = weights[l, index[run of l, t]], 0 where the index is -1, in the type of out."""
    size = index.shape[1]
    with torch.cuda.device_of(weights):
        expand_weights_kernel[(triton.cdiv(size, BLOCK), len(weights))](
            *(rows(weights), index, run_of_lane, rows(out), size), BLOCK=BLOCK, enable_fp_fusion=False
        )


def collect_gradients(partial, base, step, parts, run_of_lane, grads):
    """Launch the sum over the parts of each kept weight's gradient, in their order, added to grads."""
    size = base.shape[1]
    with torch.cuda.device_of(partial):
        collect_gradients_kernel[(triton.cdiv(size, BLOCK), len(grads))](
            *(rows(partial), base, step, parts, run_of_lane, rows(grads), size),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
