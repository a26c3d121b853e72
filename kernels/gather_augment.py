"""gather_augment: pictures by index, drawn, cropped, flipped and standardised on the way; one program for each."""

import torch
import triton
import triton.language as tl

BLOCK = 1024
CROP_FLIP = tl.constexpr(1)  # the purpose word of the draw


@triton.jit(do_not_specialize=["batch"])
def gather_augment_kernel(
    images_ptr, table_ptr, index_ptr, samples_ptr, keys_ptr, out_ptr, batch, height, width, channels, pad,
    FLIP: tl.constexpr, AUGMENT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[l, b, c, y, x] = table[c, images[index[l, b], y + dy, x' + dx, c]], where x' is x or, flipped, W - 1 - x.

    dy and dx lie in [-pad, pad]; outside of the picture the value before the table is 0. The draw is Philox block
    samples[l, b] of the lane's stream with purpose 1: word 0 gives dy, word 1 dx, the top bit of word 2 the flip.

    images_ptr   [n, H, W, C]     uint8, or the type of the result
    table_ptr    [C, 256]         the standardised value of every byte, or None: pictures are taken as they are
    index_ptr    [L, B]           int64, which picture
    samples_ptr  [L, B]           int64, the number that addresses the draw
    keys_ptr     [L, 3]           int64: seed, stream, epoch
    out_ptr      [L, B, C, H, W]  written; in memory [L, B, H, W, C] if CHANNELS_LAST
    AUGMENT                       whether anything is drawn

    Grid: L * B. Reference: swamp_fast/ops/reference/gather_augment.py.
    """
    item = tl.program_id(0).to(tl.int64)
    picture_ptr = images_ptr + tl.load(index_ptr + item) * height * width * channels
    size = height * width * channels
    # The draw: where the picture is cropped, and whether it is flipped.
    dy = 0
    dx = 0
    mirrored = False
    if AUGMENT:
        sample = tl.load(samples_ptr + item)
        key_ptr = keys_ptr + item // batch * 3
        w0, w1, w2, _ = tl.philox(
            tl.load(key_ptr),
            sample.to(tl.uint32),
            tl.load(key_ptr + 2).to(tl.uint32),
            tl.load(key_ptr + 1).to(tl.uint32),
            (sample * 0 + CROP_FLIP).to(tl.uint32),
        )
        places = (sample * 0 + 2 * pad + 1).to(tl.uint64)
        dy = ((w0.to(tl.uint64) * places) >> 32).to(tl.int32) - pad
        dx = ((w1.to(tl.uint64) * places) >> 32).to(tl.int32) - pad
        if FLIP:
            mirrored = (w2 >> 31) != 0
    for start in range(0, size, BLOCK):
        # Which number of the result each element is.
        at = start + tl.arange(0, BLOCK)
        if CHANNELS_LAST:
            c = at % channels
            x = at // channels % width
            y = at // channels // width
        else:
            x = at % width
            y = at // width % height
            c = at // width // height
        # Where it comes from in the picture, then through the table.
        from_x = tl.where(mirrored, width - 1 - x, x) + dx
        from_y = y + dy
        written = at < size
        inside = written & (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        value = tl.load(picture_ptr + (from_y * width + from_x) * channels + c, mask=inside, other=0)
        if table_ptr is not None:
            value = tl.load(table_ptr + c * 256 + value.to(tl.int32), mask=written)
        tl.store(out_ptr + item * size + at, value, mask=written)


def gather_augment(images, table, index, samples, keys, pad, flip, channels_last):
    """Launch the gather; arguments as in swamp_fast/ops/gather_augment.py."""
    _, height, width, channels = images.shape
    lanes, batch = index.shape
    dtype = images.dtype if table is None else table.dtype
    if channels_last:
        out = images.new_empty((lanes, batch, height, width, channels), dtype=dtype).permute(0, 1, 4, 2, 3)
    else:
        out = images.new_empty((lanes, batch, channels, height, width), dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(images):
            gather_augment_kernel[(lanes * batch,)](
                *(images, table, index, samples, keys, out, batch, height, width, channels, pad),
                FLIP=flip,
                AUGMENT=pad > 0 or flip,
                CHANNELS_LAST=channels_last,
                BLOCK=BLOCK,
                enable_fp_fusion=False,
            )
    return out
