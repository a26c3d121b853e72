"""gather_augment: one program a picture; the draw, the crop, the flip and the table on the way."""

import torch
import triton
import triton.language as tl

BLOCK = 1024
CROP_FLIP = tl.constexpr(1)  # the purpose word


@triton.jit(do_not_specialize=["batch"])
def gather_augment_kernel(
    images,  # [n, H, W, C]
    table,  # [C, 256], or images again if not HAS_TABLE
    index,  # [L, B]
    samples,  # [L, B] what a draw is addressed by
    keys,  # [L, 3] seed, stream, epoch
    out,  # [L, B, C, H, W], in memory [L, B, H, W, C] if CHANNELS_LAST
    batch,
    height,
    width,
    channels,
    pad,
    HAS_TABLE: tl.constexpr,
    FLIP: tl.constexpr,
    AUGMENT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    picture = images + tl.load(index + item) * height * width * channels
    size = height * width * channels
    dy = 0
    dx = 0
    mirrored = False
    if AUGMENT:
        sample = tl.load(samples + item)
        key = keys + item // batch * 3
        w0, w1, w2, _ = tl.philox(
            tl.load(key),
            sample.to(tl.uint32),
            tl.load(key + 2).to(tl.uint32),
            tl.load(key + 1).to(tl.uint32),
            (sample * 0 + CROP_FLIP).to(tl.uint32),
        )
        places = (sample * 0 + 2 * pad + 1).to(tl.uint64)
        dy = ((w0.to(tl.uint64) * places) >> 32).to(tl.int32) - pad
        dx = ((w1.to(tl.uint64) * places) >> 32).to(tl.int32) - pad
        if FLIP:
            mirrored = (w2 >> 31) != 0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if CHANNELS_LAST:
            c = at % channels
            x = at // channels % width
            y = at // channels // width
        else:
            x = at % width
            y = at // width % height
            c = at // width // height
        from_x = tl.where(mirrored, width - 1 - x, x) + dx
        from_y = y + dy
        written = at < size
        inside = written & (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        value = tl.load(picture + (from_y * width + from_x) * channels + c, mask=inside, other=0)
        if HAS_TABLE:
            value = tl.load(table + c * 256 + value.to(tl.int32), mask=written)
        tl.store(out + item * size + at, value, mask=written)


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
                *(images, images if table is None else table, index, samples, keys, out),
                *(batch, height, width, channels, pad),
                HAS_TABLE=table is not None,
                FLIP=flip,
                AUGMENT=pad > 0 or flip,
                CHANNELS_LAST=channels_last,
                BLOCK=BLOCK,
                enable_fp_fusion=False,
            )
    return out
