"""philox: the random words of one stream a lane."""

import torch
import triton
import triton.language as tl

BLOCK = 256  # Philox blocks, of four words each


@triton.jit
def philox_kernel(
    keys,  # [L, 3] seed, stream, time
    words,  # [L, count] int32
    purpose,  # int64, its low 32 bits count
    count,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(keys + lane * 3)
    stream = tl.load(keys + lane * 3 + 1)
    time = tl.load(keys + lane * 3 + 2)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        block.to(tl.uint32),
        (zero + time).to(tl.uint32),
        (zero + stream).to(tl.uint32),
        (zero + purpose).to(tl.uint32),
    )
    out = words + lane * count + block * 4
    tl.store(out, w0.to(tl.int32, bitcast=True), mask=block * 4 < count)
    tl.store(out + 1, w1.to(tl.int32, bitcast=True), mask=block * 4 + 1 < count)
    tl.store(out + 2, w2.to(tl.int32, bitcast=True), mask=block * 4 + 2 < count)
    tl.store(out + 3, w3.to(tl.int32, bitcast=True), mask=block * 4 + 3 < count)


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
