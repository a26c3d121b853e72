"""convolve, weight_grad and bias_grad: one convolution layer of all lanes in one launch, computed by matrix products.

A tap is one position of the filter. A convolution is a sum over its taps: the pixels, shifted by the tap's position,
times the tap's weights [in, out]. Maps are [L, B, H, W, C]. A linear layer is a convolution over one pixel. The weights
are dense and have the dtype of the maps. Each lane has one row of weights. A layer's part of the row has the layout
[groups, taps, in, out], which swamp_fast/engines/fused/cuda/dense.py defines.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .argument_groups import Maps, Part, Product, Window, rows
from .batch_statistics import arrived_last, target_of, tile_statistics

# The sizes of a matrix product's blocks. Keys are the bytes of an element.
PIXELS = {2: 128, 4: 128, 8: 32}
MAX_OUT = {2: 128, 4: 64, 8: 16}
MAX_IN = {2: 32, 4: 32, 8: 16}
MIN_SIDE = 16  # the smallest side of a matrix product's block
BIAS_ELEMENTS = 2048  # pixels times channels of one tile of a bias gradient
MIN_SPLIT_PIXELS = 512  # the fewest pixels per split of a weight gradient
MAX_SPLITS = 64  # the most splits of a weight gradient
# The most elements of all splits of a layer's weight gradient, unless a single split has more. This is 4 MiB per lane
# in float32. In blocks of 32 x 64 weights it gives 512 programs per lane, enough to occupy any GPU.
MAX_PART_NUMBERS = 2**20


@triton.jit
def shifted_pixels(pixel, tap, end, maps, WINDOW: tl.constexpr, BY_INPUT: tl.constexpr):
    """Find the source pixel that a tap reads for each output pixel; returns its number [N], and whether it exists [N].

        y, x = out_y * step + tap_y * dilation_y - pad_y, out_x * step + tap_x * dilation_x - pad_x

    With BY_INPUT the source is the gradient of the convolution's output, and the equations are solved for out_y, out_x.

    pixel  [N] numbers of output pixels, counted over all samples of a lane
    end    the number after the last output pixel
    maps   Maps, with the source's height and width
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
    """Returns sums [M, N] + a [M, K] @ b [K, N].

    Float64 serves only to check plans against autograd. It avoids tl.dot, because Triton has supported float64 tensor
    cores only for a short time.
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
    """Compute a convolution of all lanes, or with BY_INPUT its gradient with respect to the input.

        out[p, o] = bias[o] + sum over taps t and inputs i of source[pixel that t reads for p, i] * weights[t, i, o]

    The formula holds within each lane and group. With `to`, the kernel also computes the statistics of the rounded
    output.

    source_ptr  [L, B, H, W, groups * IN]  with BY_INPUT, the gradient of the convolution's output
    weights     Part [L, T]  this layer's [groups, taps, IN, OUT]
    bias        Part [L, P']  this layer's [groups * OUT], or None
    out_ptr     [L, B, OH, OW, groups * OUT]  written, or added to if ACCUMULATE; with BY_INPUT, the input's gradient
    to          Target of the statistics of `out`, which use EPS; or None
    maps        Maps
    samples     B
    WINDOW      Window
    PRODUCT     Product

    Grid: tiles of pixels * groups * L, blocks of outputs.
    Source: torch.nn.functional.conv2d, or torch.nn.grad.conv2d_input with BY_INPUT.
    """
    # The tile, group and lane of this program.
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
    # Sum the products over the taps, and for each tap over chunks of input channels.
    chunks: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    sums = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), PRODUCT.sum)
    for step in range(WINDOW.taps * chunks):
        tap = step // chunks
        channel = step % chunks * BLOCK_IN + i
        place, exists = shifted_pixels(pixel, tap, pixels, maps, WINDOW, BY_INPUT)
        a = tl.load(
            source_ptr + place.to(tl.int64)[:, None] * (maps.groups * IN) + channel[None, :],
            mask=exists[:, None] & (channel < IN)[None, :],
            other=0.0,
        )
        w = tl.load(
            weights_ptr + (tap * IN + channel)[:, None] * OUT + o[None, :],
            mask=(channel < IN)[:, None] & (o < OUT)[None, :],
            other=0.0,
        )
        sums = added_product(sums, a, w, PRODUCT)
    # Add the bias and, with ACCUMULATE, the previous content of `out`.
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
    """Compute a convolution's gradient with respect to the weights, as partial sums over splits of the output's pixels.

        partial[s, t, i, o] = sum over the pixels p of split s of source[pixel that t reads for p, i] * out_grad[p, o]

    The formula holds within each lane and group.

    source_ptr    [L, B, H, W, groups * IN]
    out_grad_ptr  [L, B, OH, OW, groups * OUT]
    partial       Part [L, N]  this layer's [splits, groups, taps, IN, OUT], written
    maps          Maps
    samples       B
    split_pixels  pixels per split, a multiple of 16; the last splits may have fewer, or none
    WINDOW        Window
    PRODUCT       Product

    Grid: blocks of inputs * taps * splits * groups * L, blocks of outputs.
    Source: torch.nn.grad.conv2d_weight.
    """
    # The block of weights, split, group and lane of this program.
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
    # Sum the products over the split's pixels, one tile after another.
    sums = tl.zeros((BLOCK_IN, BLOCK_OUT), PRODUCT.sum)
    end = tl.minimum(pixels, (split + 1) * split_pixels)
    for begin in range(split * split_pixels, end, BLOCK_PIXELS):
        pixel = begin + tl.arange(0, BLOCK_PIXELS)
        place, exists = shifted_pixels(pixel, tap, end, maps, WINDOW, False)
        a = tl.load(
            source_ptr + place.to(tl.int64)[:, None] * (maps.groups * IN) + i[None, :],
            mask=exists[:, None] & (i < IN)[None, :],
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
    """grads[l, c] += sum over p of out_grad[l, p, c].

    Each program sums over one tile of pixels. The last one to finish sums over the tiles.

    out_grad_ptr  [L, pixels, C]
    sums_ptr      [L, tiles, C]  written: the sums over each tile
    arrivals      Rows [L, blocks of channels]  int32, the number of programs that have finished; 0 before and after
    grads         Part [L, P']  the gradient of this layer's bias [C], added to
    SUM           the dtype of a tile's sums

    Grid: tiles, blocks of channels, L.
    Source: the bias gradient of torch.nn.functional.conv2d.
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
    """Compute one convolution, or with by_input its gradient with respect to the input.

    source      [L, B, H, W, C]; with by_input, the gradient of the convolution's output
    weights     [L, T]; this layer's begin at column `first`
    bias        a compact bank [L, P'] in which this layer's bias begins at column `first_bias`; or None
    out         [L, B, OH, OW, C'], written, or added to if accumulate; with by_input, the input's gradient
    window      (kernel, stride, padding, dilation, groups); kernel, padding and dilation are pairs (y, x)
    to          receives the statistics of `out`, as in batch_statistics.statistics; or None
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
    """Compute the gradient with respect to the weights, as `splits` partial sums that the caller has to add.

    source             [L, B, H, W, C]
    out_grad           [L, B, OH, OW, C']
    partial            [L, N], written from column `first` on
    splits             from weight_grad_splits
    window, precision  as in `convolve`
    """
    inner, outer, maps, constants = _geometry(source, out_grad, window)
    (lanes, samples), size = source.shape[:2], source.element_size()
    block_in, block_out = _block(inner, MAX_IN[size]), _block(outer, min(64, MAX_OUT[size]))
    pixels = samples * maps.out_height * maps.out_width
    # Always a multiple of 16: for other numbers Triton would compile a second kernel.
    split_pixels = MIN_SIDE * triton.cdiv(pixels, MIN_SIDE * splits)
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
            num_warps=8 if size == 4 and block_out == 64 else 4,  # 4 warps would spill registers there with Triton 3.9
        )


def bias_grad(out_grad, grads, first, arrivals):
    """Add the gradient with respect to the bias to grads [L, P'], from column `first` on.

    out_grad  [L, ..., C]
    arrivals  [L, blocks of channels] int32, 0 before and after
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
    """The number of splits of the sum over `pixels` in a layer's gradient with respect to its `weights` weights.

    The gradient's bits depend on this number, so it depends only on the layer's sizes, never on the GPU or the lanes.
    """
    return max(1, min(MAX_SPLITS, pixels // MIN_SPLIT_PIXELS, MAX_PART_NUMBERS // weights))


def _geometry(source, out, window):
    """The input and output channels of one group, the Maps, and the Window."""
    kernel, stride, padding, dilation, groups = window
    _, _, height, width, channels = source.shape
    _, _, out_height, out_width, out_channels = out.shape
    maps = Maps(height, width, out_height, out_width, groups)
    constants = Window(kernel[0] * kernel[1], kernel[1], stride, *padding, *dilation)
    return channels // groups, out_channels // groups, maps, constants


def _part(tensor, first):
    return None if tensor is None else Part(tensor, tensor.stride(0), first)


def _product(tensor, precision):
    """The Product of a tensor's dtype.

    Triton's interpreter multiplies bfloat16 wrongly and raises no error, so there the factors are upcast.
    """
    upcast = tensor.dtype == torch.bfloat16 and isinstance(convolve_kernel, InterpretedFunction)
    return Product(_sum_type(tensor), precision, upcast)


def _block(size, most):
    return max(MIN_SIDE, min(most, triton.next_power_of_2(size)))


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
