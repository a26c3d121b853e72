"""convolve and weight_grad: the convolutions of all lanes in one launch each, as matrix products over shifted pixels.

Maps are [L, B, H, W, C]; a linear layer is a convolution over one pixel. Weights come dense, the type of the maps, as
swamp_fast/engines/fused/cuda/dense.py lays them out: [groups, taps, in, out], one lane a row.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .norm import arrived_last, merge_arguments, merge_constants, merge_statistics

PIXELS = {2: 128, 4: 128, 8: 32}  # of a tile, by the bytes of a number
MOST_OUT = {2: 128, 4: 64, 8: 16}
MOST_IN = {2: 32, 4: 32, 8: 16}
LEAST = 16  # of any side of a matrix product
BIAS_ELEMENTS = 2048  # of a tile of pixels and channels
SPLIT_PIXELS = 512  # that one program of a weight gradient sums over, at least
SPLITS = 64  # of it, at most
# Numbers that all parts of a layer's gradient hold, unless one part alone holds more: 4 MiB a lane in float32, and in
# blocks of 32 x 64 weights 512 programs a lane, enough for any GPU.
PART_NUMBERS = 2**20


@triton.jit
def shifted_pixels(
    pixel,
    tap,
    end,
    height,
    width,
    out_height,
    out_width,
    STEP: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    KERNEL_X: tl.constexpr,
    BY_INPUT: tl.constexpr,
):
    """Which pixel of the source a tap reads for each pixel of the output, and whether there is one.

    By the input it is the other way round: the output's pixel is the convolution's input, the source its output.
    """
    x = pixel % out_width
    y = pixel // out_width % out_height
    sample = pixel // out_width // out_height
    if BY_INPUT:
        y = y + PAD_Y - tap // KERNEL_X * DILATION_Y
        x = x + PAD_X - tap % KERNEL_X * DILATION_X
        there = (y >= 0) & (x >= 0)
        if STEP > 1:
            there = there & (y % STEP == 0) & (x % STEP == 0)
            y = y // STEP
            x = x // STEP
    else:
        y = y * STEP + tap // KERNEL_X * DILATION_Y - PAD_Y
        x = x * STEP + tap % KERNEL_X * DILATION_X - PAD_X
        there = (y >= 0) & (x >= 0)
    there = there & (pixel < end) & (y < height) & (x < width)
    return (sample * height + y) * width + x, there


@triton.jit
def added_product(sums, a, b, PRECISION: tl.constexpr):
    """Add a [M, K] times b [K, N] to sums [M, N].

    Float64 proves plans, so it takes the long way: Triton's float64 products on tensor cores are young.
    """
    if sums.dtype == tl.float64:
        return sums + tl.sum(a[:, :, None] * b[None, :, :], 1)
    return tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit(do_not_specialize=["samples"])
def convolve_kernel(
    source,  # [L, B, H, W, groups * IN]
    weights,  # [L, ...], this layer's [groups, taps, IN, OUT] at `first`
    bias,  # [L, ...], this layer's [groups * OUT] at `first_bias`, if HAS_BIAS
    out,  # [L, B, OH, OW, groups * OUT]
    means,  # [L, tiles, groups * OUT] of each tile's pixels, if STATISTICS
    squares,  # [L, tiles, groups * OUT] sums of squared differences from them
    arrivals,  # [L, blocks of channels] zeros; if STATISTICS, as all up to arrivals_stride
    mean,  # [L, ...] and so on, as merge_statistics
    variance,
    scale,
    offset,
    norm_weights,
    statistics_stride,
    first_channel,
    norm_weights_stride,
    first_norm_weight,
    first_norm_bias,
    arrivals_stride,
    weights_stride,
    first,
    bias_stride,
    first_bias,
    samples,
    height,
    width,
    out_height,
    out_width,
    groups,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STEP: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    BY_INPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    STATISTICS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    pixels = samples * out_height * out_width
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    lane = (tl.program_id(0) // tiles // groups).to(tl.int64)
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    source += lane * samples * height * width * groups * IN + group * IN
    weights += lane * weights_stride + first + group * TAPS * IN * OUT
    chunks: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    sums = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), SUM)
    for step in range(TAPS * chunks):
        tap = step // chunks
        channel = step % chunks * BLOCK_IN + i
        place, there = shifted_pixels(
            pixel, tap, pixels, height, width, out_height, out_width,
            STEP, PAD_Y, PAD_X, DILATION_Y, DILATION_X, KERNEL_X, BY_INPUT,
        )  # fmt: skip
        a = tl.load(
            source + place.to(tl.int64)[:, None] * (groups * IN) + channel[None, :],
            mask=there[:, None] & (channel < IN)[None, :],
            other=0.0,
        )
        w = tl.load(
            weights + (tap * IN + channel)[:, None] * OUT + o[None, :],
            mask=(channel < IN)[:, None] & (o < OUT)[None, :],
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        sums = added_product(sums, a, w, PRECISION)
    inside = (pixel < pixels)[:, None] & (o < OUT)[None, :]
    if HAS_BIAS:
        b = tl.load(bias + lane * bias_stride + first_bias + group * OUT + o, mask=o < OUT, other=0.0)
        sums += b[None, :].to(SUM)
    place = (lane * pixels + pixel)[:, None] * (groups * OUT) + (group * OUT + o)[None, :]
    if ACCUMULATE:
        sums += tl.load(out + place, mask=inside, other=0.0).to(SUM)
    rounded = sums.to(out.dtype.element_ty)
    tl.store(out + place, rounded, mask=inside)
    if STATISTICS:
        value = tl.where(inside, rounded.to(SUM), 0.0)
        count = tl.minimum(pixels - tile * BLOCK_PIXELS, BLOCK_PIXELS).to(SUM)
        own = tl.sum(value, 0) / count
        away = tl.where(inside, value - own[None, :], 0.0)
        channels = groups * OUT
        c = group * OUT + o
        means += lane * tiles * channels
        squares += lane * tiles * channels
        tl.store(means + tile * channels + c, own, mask=o < OUT)
        tl.store(squares + tile * channels + c, tl.sum(away * away, 0), mask=o < OUT)
        if arrived_last(arrivals + lane * arrivals_stride + group * tl.num_programs(1) + tl.program_id(1), tiles):
            merge_statistics(
                means, squares, mean, variance, scale, offset, norm_weights, statistics_stride, first_channel,
                norm_weights_stride, first_norm_weight, first_norm_bias, lane, c, o < OUT, tiles, BLOCK_PIXELS, pixels,
                channels, EPS, HAS_NORM_WEIGHT, HAS_NORM_BIAS, BLOCK_OUT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "splits"])
def weight_grad_kernel(
    source,  # [L, B, H, W, groups * IN]
    out_grad,  # [L, B, OH, OW, groups * OUT]
    partial,  # [L, ...], this layer's [splits, groups, taps, IN, OUT] at `first`
    partial_stride,
    first,
    samples,
    height,
    width,
    out_height,
    out_width,
    groups,
    splits,
    split_pixels,  # a multiple of 16; the last splits may have fewer, or none
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TAPS: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STEP: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    chunks: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    program = tl.program_id(0)
    i = program % chunks * BLOCK_IN + tl.arange(0, BLOCK_IN)
    tap = program // chunks % TAPS
    program = program // (chunks * TAPS)
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    split = program % splits
    group = program // splits % groups
    lane = (program // splits // groups).to(tl.int64)
    pixels = samples * out_height * out_width
    source += lane * samples * height * width * groups * IN + group * IN
    out_grad += lane * pixels * groups * OUT + group * OUT
    sums = tl.zeros((BLOCK_IN, BLOCK_OUT), SUM)
    end = tl.minimum(pixels, (split + 1) * split_pixels)
    for begin in range(split * split_pixels, end, BLOCK_PIXELS):
        pixel = begin + tl.arange(0, BLOCK_PIXELS)
        place, there = shifted_pixels(
            pixel, tap, end, height, width, out_height, out_width,
            STEP, PAD_Y, PAD_X, DILATION_Y, DILATION_X, KERNEL_X, False,
        )  # fmt: skip
        a = tl.load(
            source + place.to(tl.int64)[:, None] * (groups * IN) + i[None, :],
            mask=there[:, None] & (i < IN)[None, :],
            other=0.0,
        )
        g = tl.load(
            out_grad + pixel.to(tl.int64)[:, None] * (groups * OUT) + o[None, :],
            mask=(pixel < end)[:, None] & (o < OUT)[None, :],
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
            g = g.to(tl.float32)
        sums = added_product(sums, tl.trans(a), g, PRECISION)
    at = ((split * groups + group) * TAPS + tap) * IN * OUT + i[:, None] * OUT + o[None, :]
    tl.store(
        partial + lane * partial_stride + first + at,
        sums,
        mask=(i < IN)[:, None] & (o < OUT)[None, :],
    )


@triton.jit(do_not_specialize=["pixels"])
def bias_grad_kernel(
    out_grad,  # [L, pixels, C]
    partial,  # [L, tiles, C]
    arrivals,  # [L, blocks of channels] zeros
    grads,  # [L, ...], this layer's bias at `first`: added to
    arrivals_stride,
    grads_stride,
    first,
    pixels,
    channels,
    SUM: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    lane = tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(0)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
    place = (lane * pixels + pixel)[:, None] * channels + c[None, :]
    own = tl.sum(tl.load(out_grad + place, mask=inside, other=0.0).to(SUM), 0)
    partial += lane * tiles * channels
    tl.store(partial + tl.program_id(0) * channels + c, own, mask=c < channels)
    if arrived_last(arrivals + lane * arrivals_stride + tl.program_id(1), tiles):
        total = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float64)
        for begin in range(0, tiles, BLOCK_PIXELS):
            tile = begin + tl.arange(0, BLOCK_PIXELS)
            real = (tile < tiles)[:, None] & (c < channels)[None, :]
            total += tl.load(partial + tile[:, None] * channels + c[None, :], mask=real, other=0.0).to(tl.float64)
        at = grads + lane * grads_stride + first + c
        before = tl.load(at, mask=c < channels, other=0.0)
        tl.store(at, before + tl.sum(total, 0).to(before.dtype), mask=c < channels)


def convolve(source, weights, first, bias, first_bias, out, window, by_input, accumulate, to, precision):
    """Launch one convolution, or its gradient by the input: then `source` is the output's gradient, `out` the input's.

    window      kernel, stride, padding, dilation, groups, in pairs but for stride and groups
    bias        a bank [L, ...] with this layer's at `first_bias`, or None
    to          where the statistics of `out` go, as norm.statistics has it, or None
    precision   of products in float32: "ieee" or "tf32"
    """
    kernel, stride, padding, dilation, groups = window
    lanes, samples, height, width, channels = source.shape
    _, _, out_height, out_width, out_channels = out.shape
    inner, outer, size = channels // groups, out_channels // groups, out.element_size()
    block_out = _block(outer, MOST_OUT[size])
    tiles = triton.cdiv(samples * out_height * out_width, PIXELS[size])
    if to is None:
        merge, constants = (out,) * 8 + (0,) * 6, {"EPS": 0.0, "HAS_WEIGHT": False, "HAS_BIAS": False}
    else:
        each = torch.empty(2, lanes, tiles, out_channels, dtype=to.mean.dtype, device=source.device)
        merge, constants = (*each, *merge_arguments(to)), merge_constants(to)
    grid = (tiles * lanes * groups, triton.cdiv(outer, block_out))
    with torch.cuda.device_of(source):
        convolve_kernel[grid](
            *(source, weights, weights if bias is None else bias, out, *merge),
            *(weights.stride(0), first, 0 if bias is None else bias.stride(0), first_bias),
            *(samples, height, width, out_height, out_width, groups),
            IN=inner,
            OUT=outer,
            TAPS=kernel[0] * kernel[1],
            KERNEL_X=kernel[1],
            STEP=stride,
            PAD_Y=padding[0],
            PAD_X=padding[1],
            DILATION_Y=dilation[0],
            DILATION_X=dilation[1],
            BY_INPUT=by_input,
            HAS_BIAS=bias is not None,
            ACCUMULATE=accumulate,
            STATISTICS=to is not None,
            EPS=constants["EPS"],
            HAS_NORM_WEIGHT=constants["HAS_WEIGHT"],
            HAS_NORM_BIAS=constants["HAS_BIAS"],
            SUM=_sum_type(out),
            PRECISION=precision,
            UPCAST=_upcasts(source),
            BLOCK_PIXELS=PIXELS[size],
            BLOCK_IN=_block(inner, MOST_IN[size]),
            BLOCK_OUT=block_out,
            enable_fp_fusion=True,
            num_warps=8,
        )


def weight_grad(source, out_grad, partial, first, splits, window, precision):
    """Launch the gradient by the weights, in `splits` parts that are still to be summed: see weight_grad_splits."""
    kernel, stride, padding, dilation, groups = window
    lanes, samples, height, width, channels = source.shape
    _, _, out_height, out_width, out_channels = out_grad.shape
    inner, outer, size = channels // groups, out_channels // groups, source.element_size()
    taps = kernel[0] * kernel[1]
    block_in, block_out = _block(inner, MOST_IN[size]), _block(outer, min(64, MOST_OUT[size]))
    pixels = samples * out_height * out_width
    split_pixels = LEAST * triton.cdiv(pixels, LEAST * splits)  # always a multiple, so that one kernel is for all sizes
    grid = (triton.cdiv(inner, block_in) * taps * splits * groups * lanes, triton.cdiv(outer, block_out))
    with torch.cuda.device_of(source):
        weight_grad_kernel[grid](
            *(source, out_grad, partial, partial.stride(0), first),
            *(samples, height, width, out_height, out_width, groups, splits, split_pixels),
            IN=inner,
            OUT=outer,
            TAPS=taps,
            KERNEL_X=kernel[1],
            STEP=stride,
            PAD_Y=padding[0],
            PAD_X=padding[1],
            DILATION_Y=dilation[0],
            DILATION_X=dilation[1],
            SUM=_sum_type(source),
            PRECISION=precision,
            UPCAST=_upcasts(source),
            BLOCK_PIXELS=PIXELS[size] // 2,
            BLOCK_IN=block_in,
            BLOCK_OUT=block_out,
            enable_fp_fusion=True,
        )


def bias_grad(out_grad, grads, first, arrivals):
    """Launch the gradient by the bias, added to grads [L, ...] from `first` on; arrivals as norm.statistics has it."""
    lanes, channels = out_grad.shape[0], out_grad.shape[-1]
    pixels = out_grad[0].numel() // channels
    block = _block(channels, 64)
    tiles = triton.cdiv(pixels, BIAS_ELEMENTS // block)
    partial = torch.empty(lanes, tiles, channels, dtype=grads.dtype, device=grads.device)
    with torch.cuda.device_of(out_grad):
        bias_grad_kernel[(tiles, triton.cdiv(channels, block), lanes)](
            *(out_grad, partial, arrivals, grads, arrivals.stride(0), grads.stride(0), first, pixels, channels),
            SUM=_sum_type(out_grad),
            BLOCK_PIXELS=BIAS_ELEMENTS // block,
            BLOCK_CHANNELS=block,
            enable_fp_fusion=True,
            num_warps=8,
        )


def weight_grad_splits(pixels, weights):
    """In how many parts a gradient is summed; it depends on the sizes alone, and so do the bits."""
    return max(1, min(SPLITS, pixels // SPLIT_PIXELS, PART_NUMBERS // weights))


def _block(size, most):
    return max(LEAST, min(most, triton.next_power_of_2(size)))


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _upcasts(tensor):
    """In the interpreter products of bfloat16 are wrong without an error."""
    return tensor.dtype == torch.bfloat16 and isinstance(convolve_kernel, InterpretedFunction)
