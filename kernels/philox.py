"""philox: random words, from one counter-based stream per lane."""

import torch
import triton
import triton.language as tl

BLOCK = 256  # Philox blocks per program; a Philox block has four words


@triton.jit
def philox_kernel(keys_ptr, words_ptr, purpose, count, BLOCK: tl.constexpr):
    """Write word[l, j] = word j % 4 of the Philox-4x32-10 block with the counter c = (j // 4, time, stream, purpose).

    The key k = (k0, k1) is the low and the high half of the seed. The block is c after ten rounds of

        c = (hi(0xCD9E8D57 * c2) ^ c1 ^ k0, lo(0xCD9E8D57 * c2), hi(0xD2511F53 * c0) ^ c3 ^ k1, lo(0xD2511F53 * c0))
        k = (k0 + 0x9E3779B9, k1 + 0xBB67AE85) modulo 2^32

    where hi and lo are the upper and the lower 32 bits of a 64-bit product, and ^ is the bitwise exclusive or.

    keys_ptr   [L, 3]      int64: seed, stream, time
    words_ptr  [L, count]  int32, written
    purpose                int64, only its low 32 bits are used

    Grid: blocks of words, L.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, Philox4x32-10.
    """
    lane = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(keys_ptr + lane * 3)
    stream = tl.load(keys_ptr + lane * 3 + 1)
    time = tl.load(keys_ptr + lane * 3 + 2)
    zero = block * 0  # added to the counter's other words, to give them the shape of `block`
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
    """Compute the words [L, count]; arguments as in swamp_fast/ops/philox.py."""
    lanes = keys.shape[0]
    words = keys.new_empty((lanes, count), dtype=torch.int32)
    if words.numel():
        with torch.cuda.device_of(keys):
            philox_kernel[(triton.cdiv(triton.cdiv(count, 4), BLOCK), lanes)](
                *(keys, words, purpose, count), BLOCK=BLOCK, enable_fp_fusion=False
            )
    return words
