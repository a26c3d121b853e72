"""expand_weights and collect_gradients: conversion between compact banks and the dense weights of matrix products.

A row of a compact bank [L, P'] holds a lane's kept weights and its parameters without a mask. A dense row [T] holds the
weights of all convolutions, with 0 for each pruned weight (see swamp_fast/engines/fused/cuda/dense.py).
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
    out              Rows [L, T]  written; may have another dtype than weights
    size             T

    Grid: blocks of dense weights, L.
    Source: torch.gather along the second axis, with zeros for an index of -1.
    """
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    where = tl.load(index_ptr + tl.load(run_of_lane_ptr + lane) * size + at, mask=inside, other=-1)
    value = tl.load(weights.ptr + lane * weights.stride + where, mask=where >= 0, other=0.0)
    tl.store(out.ptr + lane * out.stride + at, value.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def collect_gradients_kernel(partial, base_ptr, step_ptr, parts_ptr, run_of_lane_ptr, grads, size, BLOCK: tl.constexpr):
    """grads[l, p] += sum over k < parts[r, p] of partial[l, base[r, p] + k * step[r, p]], where r is the run of lane l.

    partial          Rows [L, N]    partial sums of the dense weights' gradients
    base_ptr         [R, P']        the column of each weight's first partial sum, -1 for none; int32, or int64 where
                                    columns reach 2^31
    step_ptr         [R, P']        int32, the distance between the columns of a weight's partial sums
    parts_ptr        [R, P']        int32, the number of a weight's partial sums
    run_of_lane_ptr  [L]            int64
    grads            Rows [L, P']   added to
    size             P'

    Grid: blocks of weights, L.
    Source: torch.gather along the second axis, summed over the parts.
    """
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(run_of_lane_ptr + lane) * size + at  # the index into the tables base, step and parts
    where = tl.load(base_ptr + entry, mask=at < size, other=-1)
    has_parts = where >= 0
    count = tl.load(parts_ptr + entry, mask=has_parts, other=0)
    # The dtype of base is wide enough for part * step, because every column lies within one row.
    step = tl.load(step_ptr + entry, mask=has_parts, other=0).to(where.dtype)
    total = tl.zeros((BLOCK,), grads.ptr.dtype.element_ty)
    for part in range(tl.max(count)):
        part_ptr = partial.ptr + lane * partial.stride + where + part * step
        total += tl.load(part_ptr, mask=has_parts & (part < count), other=0.0)
    grads_ptr = grads.ptr + lane * grads.stride + at
    tl.store(grads_ptr, tl.load(grads_ptr, mask=has_parts, other=0.0) + total, mask=has_parts)


def expand_weights(weights, index, run_of_lane, out):
    """Write each lane's dense weights from its compact ones; arguments as in expand_weights_kernel."""
    size = index.shape[1]
    with torch.cuda.device_of(weights):
        expand_weights_kernel[(triton.cdiv(size, BLOCK), len(weights))](
            *(rows(weights), index, run_of_lane, rows(out), size), BLOCK=BLOCK, enable_fp_fusion=False
        )


def collect_gradients(partial, base, step, parts, run_of_lane, grads):
    """Add the partial sums of each kept weight's gradient, in order; arguments as in collect_gradients_kernel."""
    size = base.shape[1]
    with torch.cuda.device_of(partial):
        collect_gradients_kernel[(triton.cdiv(size, BLOCK), len(grads))](
            *(rows(partial), base, step, parts, run_of_lane, rows(grads), size),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
