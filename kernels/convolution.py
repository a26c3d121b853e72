"""convolve, weight_grad and bias_grad: the convolutions of all lanes in one launch each, as matrix products.

A convolution is a sum over its taps of products of shifted pixels with that tap's weights. Maps are [L, B, H, W, C]; a
linear layer is a convolution over one pixel. Weights come dense, in the type of the maps, one lane a row, as
swamp_fast/engines/fused/cuda/dense.py lays them out: [groups, taps, in, out].
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .argument_groups import Maps, Part, Product, Window, rows
from .batch_statistics import arrived_last, target_of, tile_statistics

# Sizes of a block of a matrix product, by the bytes of a number.
PIXELS = {2: 128, 4: 128, 8: 32}
MAX_OUT = {2: 128, 4: 64, 8: 16}
MAX_IN = {2: 32, 4: 32, 8: 16}
MIN_SIDE = 16  # of any block of a matrix product
BIAS_ELEMENTS = 2048  # pixels times channels of a tile of a bias gradient
MIN_SPLIT_PIXELS = 512  # that one program of a weight gradient sums over
MAX_SPLITS = 64  # parts of a weight gradient
# All parts of a layer's gradient together, unless one part alone is larger: 4 MiB a lane in float32, and in blocks of
# 32 x 64 weights 512 programs a lane, enough for any GPU.
MAX_PART_NUMBERS = 2**20


@triton.jit
def shifted_pixels(pixel, tap, end, maps, WINDOW: tl.constexpr, BY_INPUT: tl.constexpr):
    """Which pixel of the source a tap reads for each pixel of the output, and whether there is one.

    y, x = out_y * step + tap_y * dilation_y - pad_y, out_x * step + tap_x * dilation_x - pad_x

    BY_INPUT solves this for out_y, out_x: the pixel is then one of the convolution's input, the source its output.

    pixel  [N] of all samples of a lane; `end` is behind the last
    maps   Maps, whose height and width are the source's
    """
    x = pixel % maps.out_width
    y = pixel // maps.out_width % maps.out_height
    sample = pixel // maps.out_width // maps.out_height
    if BY_INPUT:
        y = y + WINDOW.pad_y - tap // WINDOW.kernel_x * WINDOW.dilation_y
        x = x + WINDOW.pad_x - tap % WINDOW.kernel_x * WINDOW.dilation_x
        inside = (y >= 0) & (x >= 0)
        if WINDOW.step > 1:
            inside = inside & (y % WINDOW.step == 0) & (x % WINDOW.step == 0)
            y = y // WINDOW.step
            x = x // WINDOW.step
    else:
        y = y * WINDOW.step + tap // WINDOW.kernel_x * WINDOW.dilation_y - WINDOW.pad_y
        x = x * WINDOW.step + tap % WINDOW.kernel_x * WINDOW.dilation_x - WINDOW.pad_x
        inside = (y >= 0) & (x >= 0)
    inside = inside & (pixel < end) & (y < maps.height) & (x < maps.width)
    return (sample * maps.height + y) * maps.width + x, inside


@triton.jit
def added_product(sums, a, b, PRODUCT: tl.constexpr):
    """Sums [M, N] + a [M, K] @ b [K, N].

    Float64 is there to prove plans, and takes the long way: Triton's float64 products on tensor cores are young.
    """
    if sums.dtype == tl.float64:
        return sums + tl.sum(a[:, :, None] * b[None, :, :], 1)
    if PRODUCT.upcast:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRODUCT.precision, out_dtype=sums.dtype)


@triton.jit(do_not_specialize=["samples"])
def convolve_kernel(
    source_ptr, weights, bias, out_ptr, to, maps, samples, IN: tl.constexpr, OUT: tl.constexpr, WINDOW: tl.constexpr,
    BY_INPUT: tl.constexpr, ACCUMULATE: tl.constexpr, EPS: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """out[p, o] = bias[o] + sum over taps t and inputs i of source[pixel that t reads for p, i] * weights[t, i, o].

    Of each lane and group; then the statistics of `out` as it was rounded.

    source_ptr  [L, B, H, W, groups * IN]
    weights     Part [L, ...]  this layer's [groups, taps, IN, OUT]
    bias        Part [L, ...]  this layer's [groups * OUT], or None
    out_ptr     [L, B, OH, OW, groups * OUT]  written, or added to if ACCUMULATE
    to          Target of the statistics of `out`, with EPS, or None
    maps        Maps
    samples     B
    WINDOW      Window
    BY_INPUT    whether `source` is the gradient of a convolution's output and `out` that of its input
    PRODUCT     Product

    Grid: tiles of pixels * groups * L, blocks of outputs. Reference: torch.nn.functional.conv2d.
    """
    # Which tile, group and lane this program computes.
    pixels = samples * maps.out_height * maps.out_width
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % maps.groups
    lane = (tl.program_id(0) // tiles // maps.groups).to(tl.int64)
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    source_ptr += lane * samples * maps.height * maps.width * maps.groups * IN + group * IN
    weights_ptr = weights.ptr + lane * weights.stride + weights.first + group * WINDOW.taps * IN * OUT
    # The products, tap by tap and chunk by chunk of the inputs.
    chunks: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    sums = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), PRODUCT.sum)
    for step in range(WINDOW.taps * chunks):
        tap = step // chunks
        channel = step % chunks * BLOCK_IN + i
        place, there = shifted_pixels(pixel, tap, pixels, maps, WINDOW, BY_INPUT)
        a = tl.load(
            source_ptr + place.to(tl.int64)[:, None] * (maps.groups * IN) + channel[None, :],
            mask=there[:, None] & (channel < IN)[None, :],
            other=0.0,
        )
        w = tl.load(
            weights_ptr + (tap * IN + channel)[:, None] * OUT + o[None, :],
            mask=(channel < IN)[:, None] & (o < OUT)[None, :],
            other=0.0,
        )
        sums = added_product(sums, a, w, PRODUCT)
    # The bias, and what `out` holds already.
    inside = (pixel < pixels)[:, None] & (o < OUT)[None, :]
    if bias is not None:
        bias_ptr = bias.ptr + lane * bias.stride + bias.first + group * OUT
        b = tl.load(bias_ptr + o, mask=o < OUT, other=0.0)
        sums += b[None, :].to(PRODUCT.sum)
    place = (lane * pixels + pixel)[:, None] * (maps.groups * OUT) + (group * OUT + o)[None, :]
    if ACCUMULATE:
        sums += tl.load(out_ptr + place, mask=inside, other=0.0).to(PRODUCT.sum)
    rounded = sums.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, rounded, mask=inside)
    if to is not None:
        value = tl.where(inside, rounded.to(PRODUCT.sum), 0.0)
        arrival = group * tl.num_programs(1) + tl.program_id(1)
        tile_statistics(
            value, inside, to, lane, tile, tiles, group * OUT + o, o < OUT, arrival, pixels, maps.groups * OUT,
            EPS, BLOCK_PIXELS, BLOCK_OUT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "splits"])
def weight_grad_kernel(
    source_ptr, out_grad_ptr, partial, maps, samples, splits, split_pixels,
    IN: tl.constexpr, OUT: tl.constexpr, WINDOW: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """partial[s, t, i, o] = sum over the pixels p of split s of source[pixel that t reads for p, i] * out_grad[p, o].

    Of each lane and group.

    source_ptr    [L, B, H, W, groups * IN]
    out_grad_ptr  [L, B, OH, OW, groups * OUT]
    partial       Part [L, ...]  this layer's [splits, groups, taps, IN, OUT], written
    maps          Maps
    samples       B
    split_pixels  pixels of a split, a multiple of 16; the last splits may have fewer, or none
    WINDOW        Window
    PRODUCT       Product

    Grid: blocks of inputs * taps * splits * groups * L, blocks of outputs.
    """
    # Which block of weights, split, group and lane this program computes.
    chunks: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    program = tl.program_id(0)
    i = program % chunks * BLOCK_IN + tl.arange(0, BLOCK_IN)
    tap = program // chunks % WINDOW.taps
    program = program // (chunks * WINDOW.taps)
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    split = program % splits
    group = program // splits % maps.groups
    lane = (program // splits // maps.groups).to(tl.int64)
    pixels = samples * maps.out_height * maps.out_width
    source_ptr += lane * samples * maps.height * maps.width * maps.groups * IN + group * IN
    out_grad_ptr += lane * pixels * maps.groups * OUT + group * OUT
    # The products, tile by tile of the split's pixels.
    sums = tl.zeros((BLOCK_IN, BLOCK_OUT), PRODUCT.sum)
    end = tl.minimum(pixels, (split + 1) * split_pixels)
    for begin in range(split * split_pixels, end, BLOCK_PIXELS):
        pixel = begin + tl.arange(0, BLOCK_PIXELS)
        place, there = shifted_pixels(pixel, tap, end, maps, WINDOW, False)
        a = tl.load(
            source_ptr + place.to(tl.int64)[:, None] * (maps.groups * IN) + i[None, :],
            mask=there[:, None] & (i < IN)[None, :],
            other=0.0,
        )
        g = tl.load(
            out_grad_ptr + pixel.to(tl.int64)[:, None] * (maps.groups * OUT) + o[None, :],
            mask=(pixel < end)[:, None] & (o < OUT)[None, :],
            other=0.0,
        )
        sums = added_product(sums, tl.trans(a), g, PRODUCT)
    at = ((split * maps.groups + group) * WINDOW.taps + tap) * IN * OUT + i[:, None] * OUT + o[None, :]
    partial_ptr = partial.ptr + lane * partial.stride + partial.first
    tl.store(partial_ptr + at, sums, mask=(i < IN)[:, None] & (o < OUT)[None, :])


@triton.jit(do_not_specialize=["pixels"])
def bias_grad_kernel(
    out_grad_ptr, sums_ptr, arrivals, grads, pixels, channels,
    SUM: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """grads[l, c] += sum over p of out_grad[l, p, c]: over each tile, then, by the last program to arrive, over all.

    out_grad_ptr  [L, pixels, C]
    sums_ptr      [L, tiles, C]  written
    arrivals      Rows [L, blocks of channels]  zero before and after
    grads         Part [L, ...]  this layer's bias, added to
    SUM                          the type of a tile's sums

    Grid: tiles, blocks of channels, L.
    """
    # The sum over this tile.
    lane = tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(0)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
    place = (lane * pixels + pixel)[:, None] * channels + c[None, :]
    tile_sum = tl.sum(tl.load(out_grad_ptr + place, mask=inside, other=0.0).to(SUM), 0)
    sums_ptr += lane * tiles * channels
    tl.store(sums_ptr + tl.program_id(0) * channels + c, tile_sum, mask=c < channels)
    if arrived_last(arrivals.ptr + lane * arrivals.stride + tl.program_id(1), tiles):
        # The sum over all tiles.
        total = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float64)
        for begin in range(0, tiles, BLOCK_PIXELS):
            tile = begin + tl.arange(0, BLOCK_PIXELS)
            real = (tile < tiles)[:, None] & (c < channels)[None, :]
            total += tl.load(sums_ptr + tile[:, None] * channels + c[None, :], mask=real, other=0.0).to(tl.float64)
        grads_ptr = grads.ptr + lane * grads.stride + grads.first + c
        before = tl.load(grads_ptr, mask=c < channels, other=0.0)
        tl.store(grads_ptr, before + tl.sum(total, 0).to(before.dtype), mask=c < channels)


def convolve(source, weights, first, bias, first_bias, out, window, by_input, accumulate, to, precision):
    """Launch one convolution, or its gradient by the input: then `source` is the output's gradient, `out` the input's.

    source      [L, B, H, W, C]
    weights     [L, T], with this layer's from `first` on
    bias        a bank [L, P'] with this layer's from `first_bias` on, or None
    out         [L, B, OH, OW, C'], written, or added to if accumulate
    window      kernel, stride, padding, dilation, groups, in pairs but for stride and groups
    to          where the statistics of `out` go, as batch_statistics.statistics has it, or None
    precision   of products of float32: "ieee" or "tf32"
    """
    inner, outer, maps, constants = _geometry(source, out, window)
    (lanes, samples), size = source.shape[:2], out.element_size()
    block_out = _block(outer, MAX_OUT[size])
    tiles = triton.cdiv(samples * maps.out_height * maps.out_width, PIXELS[size])
    target = None if to is None else target_of(to, lanes, tiles, out.shape[-1])
    with torch.cuda.device_of(source):
        convolve_kernel[(tiles * lanes * maps.groups, triton.cdiv(outer, block_out))](
            *(source, _part(weights, first), _part(bias, first_bias), out, target, maps, samples),
            IN=inner,
            OUT=outer,
            WINDOW=constants,
            BY_INPUT=by_input,
            ACCUMULATE=accumulate,
            EPS=0.0 if to is None else to.eps,
            PRODUCT=_product(source, precision),
            BLOCK_PIXELS=PIXELS[size],
            BLOCK_IN=_block(inner, MAX_IN[size]),
            BLOCK_OUT=block_out,
            enable_fp_fusion=True,
            num_warps=8,
        )


def weight_grad(source, out_grad, partial, first, splits, window, precision):
    """Launch the gradient by the weights, in `splits` parts that are still to be summed: see weight_grad_splits.

    source     [L, B, H, W, C]
    out_grad   [L, B, OH, OW, C']
    partial    [L, ...], written from `first` on
    window, precision  as `convolve`
    """
    inner, outer, maps, constants = _geometry(source, out_grad, window)
    (lanes, samples), size = source.shape[:2], source.element_size()
    block_in, block_out = _block(inner, MAX_IN[size]), _block(outer, min(64, MAX_OUT[size]))
    pixels = samples * maps.out_height * maps.out_width
    split_pixels = MIN_SIDE * triton.cdiv(
        pixels, MIN_SIDE * splits
    )  # always a multiple, so that one kernel is compiled
    programs = triton.cdiv(inner, block_in) * constants.taps * splits * maps.groups * lanes
    with torch.cuda.device_of(source):
        weight_grad_kernel[(programs, triton.cdiv(outer, block_out))](
            *(source, out_grad, _part(partial, first), maps, samples, splits, split_pixels),
            IN=inner,
            OUT=outer,
            WINDOW=constants,
            PRODUCT=_product(source, precision),
            BLOCK_PIXELS=PIXELS[size] // 2,
            BLOCK_IN=block_in,
            BLOCK_OUT=block_out,
            enable_fp_fusion=True,
            num_warps=8 if size == 4 and block_out == 64 else 4,  # with 4, Triton 3.9 spills
        )


def bias_grad(out_grad, grads, first, arrivals):
    """Launch the gradient by the bias, added to grads [L, ...] from `first` on.

    out_grad  [L, ..., C]
    arrivals  [L, ...] int32, zero before and after
    """
    lanes, channels = out_grad.shape[0], out_grad.shape[-1]
    pixels = out_grad[0].numel() // channels
    block = _block(channels, 64)
    tiles = triton.cdiv(pixels, BIAS_ELEMENTS // block)
    sums = torch.empty(lanes, tiles, channels, dtype=grads.dtype, device=grads.device)
    with torch.cuda.device_of(out_grad):
        bias_grad_kernel[(tiles, triton.cdiv(channels, block), lanes)](
            *(out_grad, sums, rows(arrivals), _part(grads, first), pixels, channels),
            SUM=_sum_type(out_grad),
            BLOCK_PIXELS=BIAS_ELEMENTS // block,
            BLOCK_CHANNELS=block,
            enable_fp_fusion=True,
            num_warps=8,
        )


def weight_grad_splits(pixels, weights):
    """In how many parts a weight gradient is summed. It depends on the sizes alone, because the bits depend on it."""
    return max(1, min(MAX_SPLITS, pixels // MIN_SPLIT_PIXELS, MAX_PART_NUMBERS // weights))


def _geometry(source, out, window):
    """A group's inputs and outputs, the Maps, and the Window."""
    kernel, stride, padding, dilation, groups = window
    _, _, height, width, channels = source.shape
    _, _, out_height, out_width, out_channels = out.shape
    maps = Maps(height, width, out_height, out_width, groups)
    constants = Window(kernel[0] * kernel[1], kernel[1], stride, *padding, *dilation)
    return channels // groups, out_channels // groups, maps, constants


def _part(tensor, first):
    return None if tensor is None else Part(tensor, tensor.stride(0), first)


def _product(tensor, precision):
    """In the interpreter products of bfloat16 are wrong without an error, so they are upcast there."""
    upcast = tensor.dtype == torch.bfloat16 and isinstance(convolve_kernel, InterpretedFunction)
    return Product(_sum_type(tensor), precision, upcast)


def _block(size, most):
    return max(MIN_SIDE, min(most, triton.next_power_of_2(size)))


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
