"""global_threshold: radix select over the bits of |w|, on the device throughout.

Each pass counts one digit of the weights that share the digits found so far; the digit that holds the
threshold is found from the histogram by a few small tensor operations, so the host waits for nothing.
"""

import torch
import triton
import triton.language as tl

BLOCK = {torch.float32: 2048, torch.float64: 1024}
BLOCKS_PER_PROGRAM = 8  # counted in registers before the histogram in memory is touched
BINS = 2048  # no digit is wider than 11 bits
SHIFTS = {torch.float32: (20, 10, 0), torch.float64: (52, 41, 30, 20, 10, 0)}
MAGNITUDE = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}
INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}


@triton.jit
def count_digit_kernel(
    bits,  # [R, Q] int32 or int64, the bits of the weights
    masks,  # [R, Q]
    prefix,  # [R] int64, the digits found so far
    histogram,  # [R, BINS] int32, zeros
    nans,  # [R] int32, zeros
    bits_stride,
    masks_stride,
    prunable,
    magnitude_mask,
    infinity,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    ABOVE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    wanted = tl.load(prefix + run)
    counts = tl.zeros((BINS,), tl.int32)
    bad = 0
    for i in range(BLOCKS):
        columns = (tl.program_id(0).to(tl.int64) * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < prunable
        kept = tl.load(masks + run * masks_stride + columns, mask=inside, other=0) != 0
        magnitude = tl.load(bits + run * bits_stride + columns, mask=inside, other=0) & magnitude_mask
        if FIRST:
            digit = magnitude >> SHIFT
            bad += tl.sum((kept & (magnitude > infinity)).to(tl.int32))
        else:
            digit = (magnitude >> SHIFT) & ((1 << (ABOVE - SHIFT)) - 1)
            kept = kept & ((magnitude >> ABOVE).to(tl.int64) == wanted)
        counts += tl.histogram(digit.to(tl.int32), BINS, mask=kept)
    tl.atomic_add(histogram + run * BINS + tl.arange(0, BINS), counts, mask=counts > 0)
    if FIRST:
        if bad > 0:
            tl.atomic_add(nans + run, bad)


@triton.jit
def count_ties_kernel(
    bits,
    masks,
    threshold,  # [R] int64, the bits of the threshold
    ties,  # [R, programs] int32
    bits_stride,
    masks_stride,
    prunable,
    magnitude_mask,
    BLOCK: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < prunable
    kept = tl.load(masks + run * masks_stride + columns, mask=inside, other=0) != 0
    magnitude = tl.load(bits + run * bits_stride + columns, mask=inside, other=0) & magnitude_mask
    equal = kept & (magnitude.to(tl.int64) == tl.load(threshold + run))
    tl.store(ties + run * tl.num_programs(0) + tl.program_id(0), tl.sum(equal.to(tl.int32)))


@triton.jit
def write_mask_kernel(
    bits,
    masks,
    threshold,
    ties_before,  # [R, programs] int64, ties at lower indices than a program's
    ties_kept,  # [R] int64, how many ties are kept
    new_masks,  # [R, Q]
    bits_stride,
    masks_stride,
    new_masks_stride,
    prunable,
    magnitude_mask,
    BLOCK: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < prunable
    kept = tl.load(masks + run * masks_stride + columns, mask=inside, other=0) != 0
    magnitude = (tl.load(bits + run * bits_stride + columns, mask=inside, other=0) & magnitude_mask).to(tl.int64)
    bound = tl.load(threshold + run)
    equal = kept & (magnitude == bound)
    rank = tl.cumsum(equal.to(tl.int32), 0).to(tl.int64)
    rank += tl.load(ties_before + run * tl.num_programs(0) + tl.program_id(0))
    keep = kept & ((magnitude > bound) | (equal & (rank <= tl.load(ties_kept + run))))
    tl.store(new_masks + run * new_masks_stride + columns, keep.to(tl.int8), mask=inside)


def global_threshold(weights, masks, keep):
    """Launch the select; arguments as in swamp_fast/ops/global_threshold.py.

    Returns thresholds [R], masks [R, Q], and the verdict [R, 2]: NaNs found, weights that the old mask keeps.
    """
    runs, prunable = weights.shape
    dtype = weights.dtype
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    bits = weights.view(integer)
    new_masks = torch.empty(masks.shape, dtype=torch.bool, device=masks.device)
    prefix = torch.zeros(runs, dtype=torch.int64, device=weights.device)
    nans = torch.zeros(runs, dtype=torch.int32, device=weights.device)
    wanted, above, kept = keep, 0, None
    block = BLOCK[dtype]
    programs = triton.cdiv(prunable, block)
    strides = (bits.stride(0), masks.stride(0))
    with torch.cuda.device_of(weights):
        for shift in SHIFTS[dtype]:
            histogram = torch.zeros(runs, BINS, dtype=torch.int32, device=weights.device)
            count_digit_kernel[(triton.cdiv(programs, BLOCKS_PER_PROGRAM), runs)](
                *(
                    bits,
                    masks,
                    prefix,
                    histogram,
                    nans,
                    *strides,
                    prunable,
                    MAGNITUDE[dtype],
                    INFINITY[dtype],
                ),
                FIRST=above == 0,
                SHIFT=shift,
                ABOVE=above,
                BINS=BINS,
                BLOCKS=BLOCKS_PER_PROGRAM,
                BLOCK=block,
                enable_fp_fusion=False,
            )
            at_least = histogram.long().flip(1).cumsum(1).flip(1)  # [R, BINS] weights with this digit or a larger
            if kept is None:
                kept = at_least[:, 0]
            digit = ((at_least >= wanted[:, None]).sum(1) - 1).clamp(min=0)
            larger = at_least.gather(1, digit[:, None]) - histogram.long().gather(1, digit[:, None])
            wanted = wanted - larger[:, 0]
            prefix = (prefix << (above - shift if above else 0)) | digit
            above = shift
        prefix = torch.where(keep == 0, INFINITY[dtype], prefix)
        ties = torch.empty(runs, programs, dtype=torch.int32, device=weights.device)
        count_ties_kernel[(programs, runs)](
            *(bits, masks, prefix, ties, *strides, prunable, MAGNITUDE[dtype]),
            BLOCK=block,
            enable_fp_fusion=False,
        )
        ties_before = ties.long().cumsum(1) - ties
        write_mask_kernel[(programs, runs)](
            *(bits, masks, prefix, ties_before, wanted, new_masks),
            *(*strides, new_masks.stride(0), prunable, MAGNITUDE[dtype]),
            BLOCK=block,
            enable_fp_fusion=False,
        )
    thresholds = prefix.to(integer).view(dtype)
    return thresholds, new_masks, torch.stack([nans.long(), kept], 1)
