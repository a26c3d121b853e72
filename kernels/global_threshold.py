"""global_threshold: a radix select over the bits of |w|, entirely on the device.

Read as integers, the bits of two magnitudes compare as the magnitudes do, unless one is NaN. A digit is a range of
bits. Each pass finds one digit of the threshold, the highest first. It counts the weights whose higher digits equal
those of the threshold, by their next digit. A few small tensor operations on the histogram then give the threshold's
digit, so the host never has to wait for the device.
"""

import torch
import triton
import triton.language as tl

from .argument_groups import rows

BLOCK = {torch.float32: 2048, torch.float64: 1024}
BLOCKS_PER_PROGRAM = 8  # blocks that a program counts in registers before it adds to the histogram in memory
BINS = 2048  # 2^11, because no digit has more than 11 bits
SHIFTS = {torch.float32: (20, 10, 0), torch.float64: (52, 41, 30, 20, 10, 0)}  # the lowest bit of each digit
MAGNITUDE = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}  # all bits but the sign
INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # magnitudes with larger bits are NaN


@triton.jit
def count_digit_kernel(
    bits, masks, prefix_ptr, histogram_ptr, nans_ptr, prunable, magnitude_mask, infinity,
    FIRST: tl.constexpr, SHIFT: tl.constexpr, ABOVE: tl.constexpr,
    BINS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """histogram[r, d] += the number of kept weights of run r whose higher digits are prefix[r] and whose digit is d.

    The digit consists of bits SHIFT to ABOVE - 1 of |w|. In the FIRST pass there are no higher digits; this pass also
    counts the NaNs.

    bits           Rows [R, Q]  int32 or int64, the bits of the weights
    masks          Rows [R, Q]  bool
    prefix_ptr     [R]          int64, the threshold's higher digits
    histogram_ptr  [R, BINS]    int32, added to
    nans_ptr       [R]          int32, the number of NaNs among the kept weights, added to

    Grid: groups of BLOCKS blocks of weights, R.
    Source: swamp_fast/ops/reference/global_threshold.py finds the same threshold by sorting.
    """
    run = tl.program_id(1).to(tl.int64)
    prefix = tl.load(prefix_ptr + run)
    counts = tl.zeros((BINS,), tl.int32)
    nans = 0
    for i in range(BLOCKS):
        columns = (tl.program_id(0).to(tl.int64) * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < prunable
        kept = tl.load(masks.ptr + run * masks.stride + columns, mask=inside, other=0) != 0
        magnitude = tl.load(bits.ptr + run * bits.stride + columns, mask=inside, other=0) & magnitude_mask
        if FIRST:
            digit = magnitude >> SHIFT
            nans += tl.sum((kept & (magnitude > infinity)).to(tl.int32))
        else:
            digit = (magnitude >> SHIFT) & ((1 << (ABOVE - SHIFT)) - 1)
            kept = kept & ((magnitude >> ABOVE).to(tl.int64) == prefix)
        counts += tl.histogram(digit.to(tl.int32), BINS, mask=kept)
    tl.atomic_add(histogram_ptr + run * BINS + tl.arange(0, BINS), counts, mask=counts > 0)
    if FIRST:
        if nans > 0:
            tl.atomic_add(nans_ptr + run, nans)


@triton.jit
def count_ties_kernel(bits, masks, threshold_ptr, ties_ptr, prunable, magnitude_mask, BLOCK: tl.constexpr):
    """ties[r, b] = the number of kept weights in block b of run r whose |w| equals the threshold.

    bits           Rows [R, Q]    int32 or int64, the bits of the weights
    masks          Rows [R, Q]    bool
    threshold_ptr  [R]            int64, the bits of the threshold
    ties_ptr       [R, blocks]    int32, written

    Grid: blocks of weights, R.
    Source: the tie rule of swamp_fast/ops/reference/global_threshold.py, where the lowest indices are kept.
    """
    run = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < prunable
    kept = tl.load(masks.ptr + run * masks.stride + columns, mask=inside, other=0) != 0
    magnitude = tl.load(bits.ptr + run * bits.stride + columns, mask=inside, other=0) & magnitude_mask
    equal = kept & (magnitude.to(tl.int64) == tl.load(threshold_ptr + run))
    tl.store(ties_ptr + run * tl.num_programs(0) + tl.program_id(0), tl.sum(equal.to(tl.int32)))


@triton.jit
def write_mask_kernel(
    bits, masks, threshold_ptr, ties_before_ptr, ties_kept_ptr, new_masks, prunable, magnitude_mask,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """new_masks[r, q] = masks[r, q] and (|w[r, q]| > threshold[r] or q is among the first ties_kept[r] ties).

    A tie is a kept weight whose |w| equals the threshold.

    bits             Rows [R, Q]   int32 or int64, the bits of the weights
    masks            Rows [R, Q]   bool
    threshold_ptr    [R]           int64, the bits of the threshold
    ties_before_ptr  [R, blocks]   int64, the number of ties in the blocks before
    ties_kept_ptr    [R]           int64, the number of ties to keep
    new_masks        Rows [R, Q]   bool, written

    Grid: blocks of weights, R.
    Source: swamp_fast/ops/reference/global_threshold.py.
    """
    run = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < prunable
    kept = tl.load(masks.ptr + run * masks.stride + columns, mask=inside, other=0) != 0
    magnitude = (tl.load(bits.ptr + run * bits.stride + columns, mask=inside, other=0) & magnitude_mask).to(tl.int64)
    threshold = tl.load(threshold_ptr + run)
    equal = kept & (magnitude == threshold)
    # The rank of each tie among all ties of its run, counted from 1.
    rank = tl.cumsum(equal.to(tl.int32), 0).to(tl.int64)
    rank += tl.load(ties_before_ptr + run * tl.num_programs(0) + tl.program_id(0))
    keep = kept & ((magnitude > threshold) | (equal & (rank <= tl.load(ties_kept_ptr + run))))
    tl.store(new_masks.ptr + run * new_masks.stride + columns, keep.to(tl.int8), mask=inside)


def global_threshold(weights, masks, keep):
    """Find each run's threshold and new mask; arguments as in swamp_fast/ops/global_threshold.py.

    Returns the thresholds [R], the new masks [R, Q], and the verdict [R, 2]: the number of NaNs among the kept weights,
    and the number of weights that the old mask keeps.
    """
    dtype = weights.dtype
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    bits = weights.view(integer)
    with torch.cuda.device_of(weights):
        threshold, ties_kept, verdict = _select(bits, masks, keep, dtype)
        new_masks = _write_masks(bits, masks, threshold, ties_kept, dtype)
    return threshold.to(integer).view(dtype), new_masks, verdict


def _select(bits, masks, keep, dtype):
    """The bits of each run's threshold [R], the number of ties to keep [R], and the verdict [R, 2]."""
    runs, prunable = bits.shape
    prefix = torch.zeros(runs, dtype=torch.int64, device=bits.device)
    nans = torch.zeros(runs, dtype=torch.int32, device=bits.device)
    programs = triton.cdiv(triton.cdiv(prunable, BLOCK[dtype]), BLOCKS_PER_PROGRAM)
    wanted, above, kept = keep, 0, None
    for shift in SHIFTS[dtype]:
        histogram = torch.zeros(runs, BINS, dtype=torch.int32, device=bits.device)
        count_digit_kernel[(programs, runs)](
            *(rows(bits), rows(masks), prefix, histogram, nans, prunable, MAGNITUDE[dtype], INFINITY[dtype]),
            FIRST=above == 0,
            SHIFT=shift,
            ABOVE=above,
            BINS=BINS,
            BLOCKS=BLOCKS_PER_PROGRAM,
            BLOCK=BLOCK[dtype],
            enable_fp_fusion=False,
        )
        # [R, BINS] the number of weights that have this digit or a larger one.
        at_least = histogram.long().flip(1).cumsum(1).flip(1)
        if kept is None:
            kept = at_least[:, 0]
        digit = ((at_least >= wanted[:, None]).sum(1) - 1).clamp(min=0)
        larger = at_least.gather(1, digit[:, None]) - histogram.long().gather(1, digit[:, None])
        wanted = wanted - larger[:, 0]
        prefix = (prefix << (above - shift if above else 0)) | digit
        above = shift
    threshold = torch.where(keep == 0, INFINITY[dtype], prefix)
    return threshold, wanted, torch.stack([nans.long(), kept], 1)


def _write_masks(bits, masks, threshold, ties_kept, dtype):
    """The new masks [R, Q]."""
    runs, prunable = bits.shape
    programs = triton.cdiv(prunable, BLOCK[dtype])
    new_masks = torch.empty(masks.shape, dtype=torch.bool, device=masks.device)
    ties = torch.empty(runs, programs, dtype=torch.int32, device=bits.device)
    count_ties_kernel[(programs, runs)](
        *(rows(bits), rows(masks), threshold, ties, prunable, MAGNITUDE[dtype]),
        BLOCK=BLOCK[dtype],
        enable_fp_fusion=False,
    )
    ties_before = ties.long().cumsum(1) - ties
    write_mask_kernel[(programs, runs)](
        *(rows(bits), rows(masks), threshold, ties_before, ties_kept, rows(new_masks), prunable, MAGNITUDE[dtype]),
        BLOCK=BLOCK[dtype],
        enable_fp_fusion=False,
    )
    return new_masks
