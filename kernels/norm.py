"""norm and norm_grad: BatchNorm of all lanes with the addition and the ReLU behind it, forward and backward.

Maps are [L, B, H, W, C], seen as [L, pixels, C]. Sums go tile by tile, then over the tiles in float64, so that their
order depends on the sizes alone; variances are merged as (mean, sum of squares about it), never as E[x^2] - E[x]^2.
"""

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of a tile of pixels and channels
BLOCK = 1024
MERGED = tl.constexpr(2048)  # numbers that the last program takes at once


@triton.jit
def write_scale_offset(
    m, v, scale, offset, weights, first_weight, first_bias, there, EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A norm of mean m and variance v as in * scale + offset; EPS is a constant so that float64 keeps all of it."""
    by = (1.0 / tl.sqrt(v.to(tl.float64) + EPS)).to(m.dtype)
    if HAS_WEIGHT:
        by = by * tl.load(weights + first_weight, mask=there, other=0.0)
    add = -m * by
    if HAS_BIAS:
        add += tl.load(weights + first_bias, mask=there, other=0.0)
    tl.store(scale, by, mask=there)
    tl.store(offset, add, mask=there)


@triton.jit
def arrived_last(arrivals, of):
    """Whether this program is the last of so many to come; what the others stored is there then. Leaves zero."""
    tl.debug_barrier()  # after the stores of all its threads
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == of - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def merge_statistics(
    means,  # [tiles, C] of this lane
    squares,  # [tiles, C]
    mean,  # [L, ...], this norm's channels at `first`, as the three below
    variance,  # biased
    scale,  # of the norm as in * scale + offset, as scale_offset_kernel
    offset,
    weights,  # [L, ...], this norm's weight and bias at first_weight and first_bias
    statistics_stride,
    first,
    weights_stride,
    first_weight,
    first_bias,
    lane,
    c,
    there,
    tiles,
    tile_pixels,
    pixels,
    channels,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The last program's: a lane's statistics over all tiles, of the channels c that are there."""
    BLOCK_TILES: tl.constexpr = MERGED // BLOCK_CHANNELS
    total = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for begin in range(0, tiles, BLOCK_TILES):
        tile = begin + tl.arange(0, BLOCK_TILES)
        inside = (tile < tiles)[:, None] & there[None, :]
        count = tl.minimum(pixels - tile * tile_pixels, tile_pixels).to(tl.float64)
        each = tl.load(means + tile[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(tl.where(inside, each * count[:, None], 0.0), 0)
    middle = total / pixels
    total = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for begin in range(0, tiles, BLOCK_TILES):
        tile = begin + tl.arange(0, BLOCK_TILES)
        inside = (tile < tiles)[:, None] & there[None, :]
        count = tl.minimum(pixels - tile * tile_pixels, tile_pixels).to(tl.float64)
        each = tl.load(means + tile[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float64)
        square = tl.load(squares + tile[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float64)
        away = each - middle[None, :]
        total += tl.sum(tl.where(inside, square + away * away * count[:, None], 0.0), 0)
    at = lane * statistics_stride + first + c
    own = lane * weights_stride + c
    kind = mean.dtype.element_ty
    m = middle.to(kind)
    v = (total / pixels).to(kind)
    tl.store(mean + at, m, mask=there)
    tl.store(variance + at, v, mask=there)
    write_scale_offset(
        m, v, scale + at, offset + at, weights + own, first_weight, first_bias, there, EPS, HAS_WEIGHT, HAS_BIAS
    )


@triton.jit(do_not_specialize=["pixels"])
def statistics_kernel(
    source,  # [L, pixels, C]
    means,  # [L, tiles, C]
    squares,  # [L, tiles, C]
    arrivals,  # [L, blocks of channels] zeros
    mean,  # [L, ...] and so on, as merge_statistics
    variance,
    scale,
    offset,
    weights,
    statistics_stride,
    first,
    weights_stride,
    first_weight,
    first_bias,
    arrivals_stride,
    pixels,
    channels,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    lane = tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(0)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
    value = tl.load(source + (lane * pixels + pixel)[:, None] * channels + c[None, :], mask=inside, other=0.0).to(SUM)
    count = tl.minimum(pixels - tl.program_id(0) * BLOCK_PIXELS, BLOCK_PIXELS).to(SUM)
    own = tl.sum(value, 0) / count
    away = tl.where(inside, value - own[None, :], 0.0)
    means += lane * tiles * channels
    squares += lane * tiles * channels
    at = tl.program_id(0) * channels + c
    tl.store(means + at, own, mask=c < channels)
    tl.store(squares + at, tl.sum(away * away, 0), mask=c < channels)
    if arrived_last(arrivals + lane * arrivals_stride + tl.program_id(1), tiles):
        merge_statistics(
            means, squares, mean, variance, scale, offset, weights, statistics_stride, first, weights_stride,
            first_weight, first_bias, lane, c, c < channels, tiles, BLOCK_PIXELS, pixels, channels,
            EPS, HAS_WEIGHT, HAS_BIAS, BLOCK_CHANNELS,
        )  # fmt: skip


@triton.jit
def scale_offset_kernel(
    mean,  # [L, ...], this norm's channels at `first`, as the two below
    variance,
    scale,
    offset,
    weights,  # [L, ...], this norm's weight and bias at first_weight and first_bias
    statistics_stride,
    first,
    weights_stride,
    first_weight,
    first_bias,
    channels,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    at = lane * statistics_stride + first + c
    own = lane * weights_stride + c
    m = tl.load(mean + at, mask=c < channels, other=0.0)
    v = tl.load(variance + at, mask=c < channels, other=1.0)
    write_scale_offset(
        m, v, scale + at, offset + at, weights + own, first_weight, first_bias, c < channels, EPS, HAS_WEIGHT, HAS_BIAS
    )


@triton.jit(do_not_specialize=["pixels"])
def norm_kernel(
    source,  # [L, pixels, C]
    side,  # [L, pixels, C], added if HAS_SIDE
    out,  # [L, pixels, C]
    mean,  # [L, ...], this norm's channels at `first`
    scale,  # likewise
    weights,  # [L, ...], this norm's bias at first_bias
    statistics_stride,
    first,
    weights_stride,
    first_bias,
    pixels,
    channels,
    HAS_BIAS: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels * channels
    c = at % channels
    statistic = lane * statistics_stride + first + c
    m = tl.load(mean + statistic, mask=inside, other=0.0)
    place = lane * pixels * channels + at
    value = tl.load(source + place, mask=inside, other=0.0).to(m.dtype) - m
    value = value * tl.load(scale + statistic, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(weights + lane * weights_stride + first_bias + c, mask=inside, other=0.0)
    if HAS_SIDE:
        value += tl.load(side + place, mask=inside, other=0.0).to(m.dtype)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # a NaN stays
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "lanes"])
def norm_grad_sums_kernel(
    source,  # [L, pixels, C]
    out,  # [L, pixels, C], read if RELU and HAS_OUT
    out_grad,  # [L, pixels, C]
    side_grad,  # [L, pixels, C], written if HAS_SIDE
    mean,
    scale,  # as mean; read if not HAS_OUT: where out = relu(source * scale + offset) was never written
    offset,
    totals,  # [2, L, tiles, C] sums of the gradient before ReLU, and of it times (in - mean)
    arrivals,  # [L, blocks of channels] zeros
    merged,  # [2, L, C] the mean gradient, and the slope by (in - mean)
    variance,  # as mean
    grads,  # [L, ...], this norm's weight and bias at first_weight and first_bias: added to
    statistics_stride,
    first,
    grads_stride,
    first_weight,
    first_bias,
    arrivals_stride,
    pixels,
    channels,
    lanes,
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BY_BATCH: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    ADD_SIDE: tl.constexpr,
    RELU: tl.constexpr,
    HAS_OUT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    lane = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
    place = (lane * pixels + pixel)[:, None] * channels + c[None, :]
    gradient = tl.load(out_grad + place, mask=inside, other=0.0).to(SUM)
    value = tl.load(source + place, mask=inside, other=0.0).to(SUM)
    if RELU:
        if HAS_OUT:
            above = tl.load(out + place, mask=inside, other=0.0) > 0
        else:
            by = tl.load(scale + lane * statistics_stride + first + c, mask=c < channels, other=0.0)
            add = tl.load(offset + lane * statistics_stride + first + c, mask=c < channels, other=0.0)
            above = value * by[None, :] + add[None, :] > 0
        gradient = tl.where(above, gradient, 0.0)
    if HAS_SIDE:
        own = gradient
        if ADD_SIDE:
            own += tl.load(side_grad + place, mask=inside, other=0.0).to(SUM)
        tl.store(side_grad + place, own.to(side_grad.dtype.element_ty), mask=inside)
    m = tl.load(mean + lane * statistics_stride + first + c, mask=c < channels, other=0.0)
    centred = tl.where(inside, value - m[None, :], 0.0)
    BLOCK_TILES: tl.constexpr = MERGED // BLOCK_CHANNELS
    there = c < channels
    tiles = tl.num_programs(0)
    second = totals + tl.num_programs(2).to(tl.int64) * tiles * channels
    at = (lane * tiles + tl.program_id(0)) * channels + c
    tl.store(totals + at, tl.sum(gradient, 0), mask=there)
    tl.store(second + at, tl.sum(gradient * centred, 0), mask=there)
    if arrived_last(arrivals + lane * arrivals_stride + tl.program_id(1), tiles):
        sum_grad = tl.zeros((BLOCK_CHANNELS,), tl.float64)
        sum_centred = tl.zeros((BLOCK_CHANNELS,), tl.float64)
        for begin in range(0, tiles, BLOCK_TILES):
            tile = begin + tl.arange(0, BLOCK_TILES)
            real = (tile < tiles)[:, None] & there[None, :]
            row = (lane * tiles + tile)[:, None] * channels + c[None, :]
            sum_grad += tl.sum(tl.load(totals + row, mask=real, other=0.0).to(tl.float64), 0)
            sum_centred += tl.sum(tl.load(second + row, mask=real, other=0.0).to(tl.float64), 0)
        v = tl.load(variance + lane * statistics_stride + first + c, mask=there, other=1.0).to(tl.float64)
        rstd = 1.0 / tl.sqrt(v + EPS)
        own_grads = grads + lane * grads_stride + c
        if HAS_WEIGHT:
            before = tl.load(own_grads + first_weight, mask=there, other=0.0)
            tl.store(own_grads + first_weight, before + (sum_centred * rstd).to(before.dtype), mask=there)
        if HAS_BIAS:
            before = tl.load(own_grads + first_bias, mask=there, other=0.0)
            tl.store(own_grads + first_bias, before + sum_grad.to(before.dtype), mask=there)
        if not BY_BATCH:
            sum_grad = tl.zeros((BLOCK_CHANNELS,), tl.float64)
            sum_centred = tl.zeros((BLOCK_CHANNELS,), tl.float64)
        kind = merged.dtype.element_ty
        at = lane * channels + c
        tl.store(merged + at, (sum_grad / pixels).to(kind), mask=there)
        tl.store(merged + lanes * channels + at, (sum_centred / pixels * rstd * rstd).to(kind), mask=there)


@triton.jit(do_not_specialize=["pixels", "lanes"])
def norm_grad_kernel(
    source,  # [L, pixels, C]
    out,  # [L, pixels, C], read if RELU and HAS_OUT
    out_grad,  # [L, pixels, C]
    in_grad,  # [L, pixels, C]
    merged,  # [2, L, C]
    mean,
    scale,  # as mean
    offset,  # read if not HAS_OUT
    statistics_stride,
    first,
    pixels,
    channels,
    lanes,
    ACCUMULATE: tl.constexpr,
    RELU: tl.constexpr,
    HAS_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels * channels
    c = at % channels
    statistic = lane * statistics_stride + first + c
    m = tl.load(mean + statistic, mask=inside, other=0.0)
    by = tl.load(scale + statistic, mask=inside, other=0.0)
    place = lane * pixels * channels + at
    gradient = tl.load(out_grad + place, mask=inside, other=0.0).to(m.dtype)
    value = tl.load(source + place, mask=inside, other=0.0).to(m.dtype)
    if RELU:
        if HAS_OUT:
            above = tl.load(out + place, mask=inside, other=0.0) > 0
        else:
            above = value * by + tl.load(offset + statistic, mask=inside, other=0.0) > 0
        gradient = tl.where(above, gradient, 0.0)
    middle = tl.load(merged + lane * channels + c, mask=inside, other=0.0)
    slope = tl.load(merged + (lanes + lane) * channels + c, mask=inside, other=0.0)
    grad = (gradient - middle - (value - m) * slope) * by
    if ACCUMULATE:
        grad += tl.load(in_grad + place, mask=inside, other=0.0).to(m.dtype)
    tl.store(in_grad + place, grad.to(in_grad.dtype.element_ty), mask=inside)


def statistics(source, to):
    """Launch the mean and the biased variance of each channel, and what scale_offset makes of them.

    to  where they go: mean, variance, scale, offset [L, ...] from `first` on; `weights` [L, ...] with the norm's weight
        at first_weight and its bias at first_bias, -1 for none; eps; arrivals [L, ...] int32, zeros before and after
    """
    lanes, pixels, channels = _extents(source)
    block = _block(channels)
    per_tile = ELEMENTS // block // (2 if source.dtype == torch.float64 else 1)
    tiles = triton.cdiv(pixels, per_tile)
    means, squares = torch.empty(2, lanes, tiles, channels, dtype=to.mean.dtype, device=source.device)
    with torch.cuda.device_of(source):
        statistics_kernel[(tiles, triton.cdiv(channels, block), lanes)](
            *(source, means, squares, *merge_arguments(to), pixels, channels),
            **merge_constants(to),
            SUM=_sum_type(source),
            BLOCK_PIXELS=per_tile,
            BLOCK_CHANNELS=block,
            enable_fp_fusion=False,
            num_warps=8,
        )


def merge_arguments(to):
    """What merge_statistics takes, as the kernels around it do: see `statistics`."""
    strides = to.mean.stride(0), to.first, to.weights.stride(0), to.first_weight, to.first_bias, to.arrivals.stride(0)
    return to.arrivals, to.mean, to.variance, to.scale, to.offset, to.weights, *strides


def merge_constants(to):
    """Likewise; eps is one so that float64 keeps all of it."""
    return {"EPS": to.eps, "HAS_WEIGHT": to.first_weight >= 0, "HAS_BIAS": to.first_bias >= 0}


def scale_offset(mean, variance, scale, offset, first, channels, weights, first_weight, first_bias, eps):
    """Launch a norm as in * scale + offset: [L, ...] as mean and variance, from `first` on."""
    with torch.cuda.device_of(mean):
        scale_offset_kernel[(len(mean),)](
            *(mean, variance, scale, offset, weights, mean.stride(0), first, weights.stride(0), first_weight),
            *(first_bias, channels),
            EPS=eps,
            HAS_WEIGHT=first_weight >= 0,
            HAS_BIAS=first_bias >= 0,
            BLOCK=triton.next_power_of_2(channels),
            enable_fp_fusion=False,
        )


def norm(source, side, out, mean, scale, first, weights, first_bias, relu):
    """Launch out = relu?((source - mean) * scale + bias + side?); -1 is no bias, None no side."""
    lanes, pixels, channels = _extents(source)
    with torch.cuda.device_of(source):
        norm_kernel[(triton.cdiv(pixels * channels, BLOCK), lanes)](
            *(source, source if side is None else side, out, mean, scale, weights),
            *(mean.stride(0), first, weights.stride(0), first_bias, pixels, channels),
            HAS_BIAS=first_bias >= 0,
            HAS_SIDE=side is not None,
            RELU=relu,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


def norm_grad(
    source,
    out,
    out_grad,
    in_grad,
    side_grad,
    accumulate,
    accumulate_side,
    mean,
    variance,
    scale,
    offset,
    first,
    grads,
    first_weight,
    first_bias,
    eps,
    relu,
    by_batch,
    arrivals,
):
    """Launch the gradients of `norm`.

    out               None where it was never written; then relu's mask comes from scale and offset
    in_grad           None where it isn't needed
    side_grad         None where nothing was added
    arrivals          as `statistics`
    """
    has_out = out is not None
    out = out if has_out else source
    lanes, pixels, channels = _extents(source)
    block = _block(channels)
    per_tile = ELEMENTS // block // (2 if source.dtype == torch.float64 else 1)
    tiles = triton.cdiv(pixels, per_tile)
    totals = torch.empty(2, lanes, tiles, channels, dtype=mean.dtype, device=mean.device)
    merged = torch.empty(2, lanes, channels, dtype=mean.dtype, device=mean.device)
    with torch.cuda.device_of(source):
        norm_grad_sums_kernel[(tiles, triton.cdiv(channels, block), lanes)](
            *(source, out, out_grad, out if side_grad is None else side_grad, mean, scale, offset, totals),
            *(arrivals, merged, variance, grads, mean.stride(0), first, grads.stride(0), first_weight, first_bias),
            *(arrivals.stride(0), pixels, channels, lanes),
            EPS=eps,
            HAS_WEIGHT=first_weight >= 0,
            HAS_BIAS=first_bias >= 0,
            BY_BATCH=by_batch,
            HAS_SIDE=side_grad is not None,
            ADD_SIDE=accumulate_side,
            RELU=relu,
            HAS_OUT=has_out,
            SUM=_sum_type(source),
            BLOCK_PIXELS=per_tile,
            BLOCK_CHANNELS=block,
            enable_fp_fusion=False,
            num_warps=8,
        )
        if in_grad is None:
            return
        norm_grad_kernel[(triton.cdiv(pixels * channels, BLOCK), lanes)](
            *(source, out, out_grad, in_grad, merged, mean, scale, offset),
            *(mean.stride(0), first, pixels, channels, lanes),
            ACCUMULATE=accumulate,
            RELU=relu,
            HAS_OUT=has_out,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


def _extents(source):
    lanes, channels = source.shape[0], source.shape[-1]
    return lanes, source[0].numel() // channels, channels


def _block(channels):
    return max(16, min(64, triton.next_power_of_2(channels)))


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
