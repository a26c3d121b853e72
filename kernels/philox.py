"""philox: the random words of one stream for each lane."""

import torch
import triton
import triton.language as tl

BLOCK = 256  # Philox blocks of one program, of four words each


@triton.jit
def philox_kernel(keys_ptr, words_ptr, purpose, count, BLOCK: tl.constexpr):
    """Philox-4x32-10: word j is word j % 4 of the block with counter (j // 4, time, stream, purpose) and key seed.

    keys_ptr   [L, 3]      int64: seed, stream, time
    words_ptr  [L, count]  int32, written
    purpose                int64, of which the low 32 bits count

    Grid: blocks of words, L. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    lane = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(keys_ptr + lane * 3)
    stream = tl.load(keys_ptr + lane * 3 + 1)
    time = tl.load(keys_ptr + lane * 3 + 2)
    zero = block * 0  # gives the other words of the counter the shape of a block
    w0, w1, w2, w3 = tl.philox(
        seed,
        block.to(tl.uint32),
        (zero + time).to(tl.uint32),
        (zero + stream).to(tl.uint32),
        (zero + purpose).to(tl.uint32),
    )
    out_ptr = words_ptr + lane * count + block * 4
    tl.store(out_ptr, w0.to(tl.int32, bitcast=True), mask=block * 4 < count)
    tl.store(out_ptr + 1, w1.to(tl.int32, bitcast=True), mask=block * 4 + 1 < count)
    tl.store(out_ptr + 2, w2.to(tl.int32, bitcast=True), mask=block * 4 + 2 < count)
    tl.store(out_ptr + 3, w3.to(tl.int32, bitcast=True), mask=block * 4 + 3 < count)


def philox(keys, purpose, count):
    """Launch the draws; arguments as in swamp_fast/ops/philox.py."""
    lanes = keys.shape[0]
    words = keys.new_empty((lanes, count), dtype=torch.int32)
    if words.numel():
        with torch.cuda.device_of(keys):
            philox_kernel[(triton.cdiv(triton.cdiv(count, 4), BLOCK), lanes)](
                *(keys, words, purpose, count), BLOCK=BLOCK, enable_fp_fusion=False
            )
    return words
