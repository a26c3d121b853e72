"""gather_augment: gathers pictures by index, and crops, flips and standardises them; one program per picture."""

import torch
import triton
import triton.language as tl

BLOCK = 1024
CROP_FLIP = tl.constexpr(1)  # the purpose of the random words, in their Philox counter


@triton.jit(do_not_specialize=["batch"])
def gather_augment_kernel(
    images_ptr, table_ptr, index_ptr, samples_ptr, keys_ptr, out_ptr, batch, height, width, channels, pad,
    FLIP: tl.constexpr, AUGMENT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[l, b, c, y, x] = table[c, images[index[l, b], y + dy, x' + dx, c]], where x' is x or, if flipped, W - 1 - x.

    dy and dx lie in [-pad, pad]. Outside the picture, the value before the table is 0. The random words are Philox
    block samples[l, b] of the lane's stream with purpose 1: word 0 gives dy, word 1 gives dx, and the top bit of word 2
    gives the flip.

    images_ptr   [n, H, W, C]     uint8, or the dtype of the result
    table_ptr    [C, 256]         the standardised value of every byte; None to copy the pictures' own values
    index_ptr    [L, B]           int64, the picture
    samples_ptr  [L, B]           int64, the number of the Philox block
    keys_ptr     [L, 3]           int64: seed, stream, epoch
    out_ptr      [L, B, C, H, W]  written; in memory [L, B, H, W, C] if CHANNELS_LAST
    AUGMENT                       whether pictures are cropped or flipped; if not, no random words are computed

    Grid: L * B.
    Source: swamp_fast/ops/reference/gather_augment.py.
    """
    item = tl.program_id(0).to(tl.int64)
    picture_ptr = images_ptr + tl.load(index_ptr + item) * height * width * channels
    size = height * width * channels
    # Draw the place of the crop, and whether the picture is flipped.
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
        # The channel c, row y and column x of each element of the result.
        at = start + tl.arange(0, BLOCK)
        if CHANNELS_LAST:
            c = at % channels
            x = at // channels % width
            y = at // channels // width
        else:
            x = at % width
            y = at // width % height
            c = at // width // height
        # Read the element from the picture, then map it through the table.
        from_x = tl.where(mirrored, width - 1 - x, x) + dx
        from_y = y + dy
        written = at < size
        inside = written & (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        value = tl.load(picture_ptr + (from_y * width + from_x) * channels + c, mask=inside, other=0)
        if table_ptr is not None:
            value = tl.load(table_ptr + c * 256 + value.to(tl.int32), mask=written)
        tl.store(out_ptr + item * size + at, value, mask=written)


def gather_augment(images, table, index, samples, keys, pad, flip, channels_last):
    """Gather the pictures [L, B, C, H, W]; arguments as in swamp_fast/ops/gather_augment.py."""
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
