"""norm and norm_grad: BatchNorm of all lanes with the addition and the ReLU behind it, forward and backward.

Maps are [L, B, H, W, C], seen as [L, pixels, C]. Sums go tile by tile, then over the tiles in float64, so that their
order depends on the sizes alone. Variances are merged as (mean, sum of squares about it), never as E[x^2] - E[x]^2.

EPS is a constant because an argument of a kernel would be rounded to float32.
"""

import torch
import triton
import triton.language as tl

from .arguments import Target, affine_of, norm_of, rows

TILE_ELEMENTS = 4096  # pixels times channels of a tile
BLOCK = 1024
MERGED = tl.constexpr(2048)  # tiles times channels that the last program loads at once


@triton.jit
def write_scale_offset(mean, variance, norm, affine, lane, c, inside, EPS: tl.constexpr):
    """Store a norm as input * scale + offset: scale = weight / sqrt(variance + EPS), offset = bias - mean * scale.

    mean, variance  [C] of the channels c
    norm, affine    Norm and Affine
    inside          [C] which channels there are
    """
    scale = (1.0 / tl.sqrt(variance.to(tl.float64) + EPS)).to(mean.dtype)
    affine_ptr = affine.ptr + lane * affine.stride + c
    if affine.first_weight is not None:
        scale = scale * tl.load(affine_ptr + affine.first_weight, mask=inside, other=0.0)
    offset = -mean * scale
    if affine.first_bias is not None:
        offset += tl.load(affine_ptr + affine.first_bias, mask=inside, other=0.0)
    at = lane * norm.stride + norm.first + c
    tl.store(norm.scale_ptr + at, scale, mask=inside)
    tl.store(norm.offset_ptr + at, offset, mask=inside)


@triton.jit
def arrived_last(arrivals_ptr, programs):
    """Whether this program is the last of them to arrive; it then sees what the others stored. The counter is reset."""
    tl.debug_barrier()  # after the stores of all threads of this program
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@triton.jit
def merge_statistics(
    to, lane, c, inside, tiles, tile_pixels, pixels, channels, EPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Merge the statistics of all tiles of a lane; the last program to arrive does it.

        mean     = sum over tiles of count * mean of the tile / pixels
        variance = sum over tiles of (squares of the tile + count * (mean of the tile - mean)^2) / pixels

    to           Target
    c            [C] channels
    inside       [C] which of them there are
    tile_pixels  pixels of a tile; the last may have fewer

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    BLOCK_TILES: tl.constexpr = MERGED // BLOCK_CHANNELS
    means_ptr = to.means_ptr + lane * tiles * channels
    squares_ptr = to.squares_ptr + lane * tiles * channels
    # The mean.
    total = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for begin in range(0, tiles, BLOCK_TILES):
        tile = begin + tl.arange(0, BLOCK_TILES)
        real = (tile < tiles)[:, None] & inside[None, :]
        count = tl.minimum(pixels - tile * tile_pixels, tile_pixels).to(tl.float64)
        tile_mean = tl.load(means_ptr + tile[:, None] * channels + c[None, :], mask=real, other=0.0).to(tl.float64)
        total += tl.sum(tl.where(real, tile_mean * count[:, None], 0.0), 0)
    middle = total / pixels
    # The variance about it.
    total = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for begin in range(0, tiles, BLOCK_TILES):
        tile = begin + tl.arange(0, BLOCK_TILES)
        real = (tile < tiles)[:, None] & inside[None, :]
        count = tl.minimum(pixels - tile * tile_pixels, tile_pixels).to(tl.float64)
        tile_mean = tl.load(means_ptr + tile[:, None] * channels + c[None, :], mask=real, other=0.0).to(tl.float64)
        square = tl.load(squares_ptr + tile[:, None] * channels + c[None, :], mask=real, other=0.0).to(tl.float64)
        away = tile_mean - middle[None, :]
        total += tl.sum(tl.where(real, square + away * away * count[:, None], 0.0), 0)
    # Both, and what follows from them.
    kind = to.norm.mean_ptr.dtype.element_ty
    mean = middle.to(kind)
    variance = (total / pixels).to(kind)
    at = lane * to.norm.stride + to.norm.first + c
    tl.store(to.norm.mean_ptr + at, mean, mask=inside)
    tl.store(to.norm.variance_ptr + at, variance, mask=inside)
    write_scale_offset(mean, variance, to.norm, to.affine, lane, c, inside, EPS)


@triton.jit
def tile_statistics(
    value, inside, to, lane, tile, tiles, c, c_inside, arrival, pixels, channels,
    EPS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store the statistics of one tile; the last program of the tile's channels to arrive merges those of all tiles.

    value     [P, C] the tile, 0 where it isn't inside
    inside    [P, C]
    to        Target
    c         [C] the tile's channels; c_inside [C] which of them there are
    arrival   which of the lane's counters these channels have
    """
    count = tl.minimum(pixels - tile * BLOCK_PIXELS, BLOCK_PIXELS).to(value.dtype)
    mean = tl.sum(value, 0) / count
    away = tl.where(inside, value - mean[None, :], 0.0)
    first = lane * tiles * channels
    tl.store(to.means_ptr + first + tile * channels + c, mean, mask=c_inside)
    tl.store(to.squares_ptr + first + tile * channels + c, tl.sum(away * away, 0), mask=c_inside)
    if arrived_last(to.arrivals.ptr + lane * to.arrivals.stride + arrival, tiles):
        merge_statistics(to, lane, c, c_inside, tiles, BLOCK_PIXELS, pixels, channels, EPS, BLOCK_CHANNELS)


@triton.jit(do_not_specialize=["pixels"])
def statistics_kernel(
    source_ptr, to, pixels, channels,
    EPS: tl.constexpr, SUM: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """mean[l, c], variance[l, c] = the mean and the biased variance of source[l, :, c]; see merge_statistics.

    source_ptr  [L, pixels, C]
    to          Target
    SUM                         the type of a tile's sums

    Grid: tiles, blocks of channels, L.
    """
    lane = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0)
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
    at = (lane * pixels + pixel)[:, None] * channels + c[None, :]
    value = tl.load(source_ptr + at, mask=inside, other=0.0).to(SUM)
    tile_statistics(
        value, inside, to, lane, tile, tl.num_programs(0), c, c < channels, tl.program_id(1), pixels, channels,
        EPS, BLOCK_PIXELS, BLOCK_CHANNELS,
    )  # fmt: skip


@triton.jit
def scale_offset_kernel(norm, affine, channels, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """scale[l, c], offset[l, c] of a norm whose mean and variance are given; see write_scale_offset.

    norm    Norm of which scale and offset are written
    affine  Affine

    Grid: L.
    """
    lane = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    at = lane * norm.stride + norm.first + c
    mean = tl.load(norm.mean_ptr + at, mask=c < channels, other=0.0)
    variance = tl.load(norm.variance_ptr + at, mask=c < channels, other=1.0)
    write_scale_offset(mean, variance, norm, affine, lane, c, c < channels, EPS)


@triton.jit(do_not_specialize=["pixels"])
def norm_kernel(source_ptr, side_ptr, out_ptr, norm, affine, pixels, channels, RELU: tl.constexpr, BLOCK: tl.constexpr):
    """Out = relu((source - mean) * scale + bias + side), without what there isn't.

    source_ptr  [L, pixels, C]
    side_ptr    [L, pixels, C]  or None
    out_ptr     [L, pixels, C]  written
    norm        Norm of which mean and scale are read
    affine      Affine of which the bias is read

    Grid: blocks of numbers, L. Source: Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1.
    """
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels * channels
    c = at % channels
    statistic = lane * norm.stride + norm.first + c
    mean = tl.load(norm.mean_ptr + statistic, mask=inside, other=0.0)
    place = lane * pixels * channels + at
    value = tl.load(source_ptr + place, mask=inside, other=0.0).to(mean.dtype) - mean
    value = value * tl.load(norm.scale_ptr + statistic, mask=inside, other=0.0)
    if affine.first_bias is not None:
        value += tl.load(affine.ptr + lane * affine.stride + affine.first_bias + c, mask=inside, other=0.0)
    if side_ptr is not None:
        value += tl.load(side_ptr + place, mask=inside, other=0.0).to(mean.dtype)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # a NaN stays
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "lanes"])
def norm_grad_sums_kernel(
    source_ptr, out_ptr, out_grad_ptr, side_grad_ptr, sums_ptr, arrivals, slopes_ptr, norm, affine_grads,
    pixels, channels, lanes, EPS: tl.constexpr, BY_BATCH: tl.constexpr, ADD_SIDE: tl.constexpr, RELU: tl.constexpr,
    SUM: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sums that the gradients of `norm` are made of: over a tile, then, by the last program to arrive, over all.

    With g = out_grad where relu let it through, centred = source - mean, and rstd = 1 / sqrt(variance + EPS):

        side_grad     = g
        weight_grad  += rstd * sum of g * centred
        bias_grad    += sum of g
        slopes[0]     = sum of g / pixels                       (0 unless BY_BATCH)
        slopes[1]     = rstd^2 * sum of g * centred / pixels    (0 unless BY_BATCH)

    source_ptr     [L, pixels, C]
    out_ptr        [L, pixels, C]    None if the output was never written: relu's mask comes from scale and offset
    out_grad_ptr   [L, pixels, C]
    side_grad_ptr  [L, pixels, C]    written, or added to if ADD_SIDE; None without one
    sums_ptr       [2, L, tiles, C]  written, sums of g and of g * centred over each tile
    arrivals       Rows [L, blocks of channels]  zero before and after
    slopes_ptr     [2, L, C]         written
    norm           Norm
    affine_grads   Affine of the gradients, added to

    Grid: tiles, blocks of channels, L.
    """
    lane = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    c_inside = c < channels
    inside = (pixel < pixels)[:, None] & c_inside[None, :]
    place = (lane * pixels + pixel)[:, None] * channels + c[None, :]
    statistic = lane * norm.stride + norm.first + c
    gradient = tl.load(out_grad_ptr + place, mask=inside, other=0.0).to(SUM)
    value = tl.load(source_ptr + place, mask=inside, other=0.0).to(SUM)
    # Through relu, and to the side.
    if RELU:
        if out_ptr is not None:
            above = tl.load(out_ptr + place, mask=inside, other=0.0) > 0
        else:
            scale = tl.load(norm.scale_ptr + statistic, mask=c_inside, other=0.0)
            offset = tl.load(norm.offset_ptr + statistic, mask=c_inside, other=0.0)
            above = value * scale[None, :] + offset[None, :] > 0
        gradient = tl.where(above, gradient, 0.0)
    if side_grad_ptr is not None:
        side_grad = gradient
        if ADD_SIDE:
            side_grad += tl.load(side_grad_ptr + place, mask=inside, other=0.0).to(SUM)
        tl.store(side_grad_ptr + place, side_grad.to(side_grad_ptr.dtype.element_ty), mask=inside)
    # The sums over this tile.
    mean = tl.load(norm.mean_ptr + statistic, mask=c_inside, other=0.0)
    centred = tl.where(inside, value - mean[None, :], 0.0)
    tiles = tl.num_programs(0)
    centred_sums_ptr = sums_ptr + tl.num_programs(2).to(tl.int64) * tiles * channels
    at = (lane * tiles + tl.program_id(0)) * channels + c
    tl.store(sums_ptr + at, tl.sum(gradient, 0), mask=c_inside)
    tl.store(centred_sums_ptr + at, tl.sum(gradient * centred, 0), mask=c_inside)
    if arrived_last(arrivals.ptr + lane * arrivals.stride + tl.program_id(1), tiles):
        # The sums over all tiles.
        BLOCK_TILES: tl.constexpr = MERGED // BLOCK_CHANNELS
        sum_grad = tl.zeros((BLOCK_CHANNELS,), tl.float64)
        sum_centred = tl.zeros((BLOCK_CHANNELS,), tl.float64)
        for begin in range(0, tiles, BLOCK_TILES):
            tile = begin + tl.arange(0, BLOCK_TILES)
            real = (tile < tiles)[:, None] & c_inside[None, :]
            row = (lane * tiles + tile)[:, None] * channels + c[None, :]
            sum_grad += tl.sum(tl.load(sums_ptr + row, mask=real, other=0.0).to(tl.float64), 0)
            sum_centred += tl.sum(tl.load(centred_sums_ptr + row, mask=real, other=0.0).to(tl.float64), 0)
        variance = tl.load(norm.variance_ptr + statistic, mask=c_inside, other=1.0).to(tl.float64)
        rstd = 1.0 / tl.sqrt(variance + EPS)
        # The gradients of the weight and the bias.
        affine_ptr = affine_grads.ptr + lane * affine_grads.stride + c
        if affine_grads.first_weight is not None:
            before = tl.load(affine_ptr + affine_grads.first_weight, mask=c_inside, other=0.0)
            after = before + (sum_centred * rstd).to(before.dtype)
            tl.store(affine_ptr + affine_grads.first_weight, after, mask=c_inside)
        if affine_grads.first_bias is not None:
            before = tl.load(affine_ptr + affine_grads.first_bias, mask=c_inside, other=0.0)
            tl.store(affine_ptr + affine_grads.first_bias, before + sum_grad.to(before.dtype), mask=c_inside)
        # What norm_grad_kernel needs of them.
        if not BY_BATCH:
            sum_grad = tl.zeros((BLOCK_CHANNELS,), tl.float64)
            sum_centred = tl.zeros((BLOCK_CHANNELS,), tl.float64)
        kind = slopes_ptr.dtype.element_ty
        at = lane * channels + c
        tl.store(slopes_ptr + at, (sum_grad / pixels).to(kind), mask=c_inside)
        slope = (sum_centred / pixels * rstd * rstd).to(kind)
        tl.store(slopes_ptr + lanes * channels + at, slope, mask=c_inside)


@triton.jit(do_not_specialize=["pixels", "lanes"])
def norm_grad_kernel(
    source_ptr, out_ptr, out_grad_ptr, in_grad_ptr, slopes_ptr, norm, pixels, channels, lanes,
    ACCUMULATE: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """in_grad = (g - slopes[0] - (source - mean) * slopes[1]) * scale, with g = out_grad where relu let it through.

    source_ptr    [L, pixels, C]
    out_ptr       [L, pixels, C]  None if the output was never written: relu's mask comes from scale and offset
    out_grad_ptr  [L, pixels, C]
    in_grad_ptr   [L, pixels, C]  written, or added to if ACCUMULATE
    slopes_ptr    [2, L, C]       from norm_grad_sums_kernel
    norm          Norm

    Grid: blocks of numbers, L. Source: Ioffe and Szegedy 2015, arXiv 1502.03167, section 3, with the sums collected.
    """
    lane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels * channels
    c = at % channels
    statistic = lane * norm.stride + norm.first + c
    mean = tl.load(norm.mean_ptr + statistic, mask=inside, other=0.0)
    scale = tl.load(norm.scale_ptr + statistic, mask=inside, other=0.0)
    place = lane * pixels * channels + at
    gradient = tl.load(out_grad_ptr + place, mask=inside, other=0.0).to(mean.dtype)
    value = tl.load(source_ptr + place, mask=inside, other=0.0).to(mean.dtype)
    # Through relu.
    if RELU:
        if out_ptr is not None:
            above = tl.load(out_ptr + place, mask=inside, other=0.0) > 0
        else:
            above = value * scale + tl.load(norm.offset_ptr + statistic, mask=inside, other=0.0) > 0
        gradient = tl.where(above, gradient, 0.0)
    # Through the norm, whose mean and variance depend on every input too.
    mean_grad = tl.load(slopes_ptr + lane * channels + c, mask=inside, other=0.0)
    slope = tl.load(slopes_ptr + (lanes + lane) * channels + c, mask=inside, other=0.0)
    grad = (gradient - mean_grad - (value - mean) * slope) * scale
    if ACCUMULATE:
        grad += tl.load(in_grad_ptr + place, mask=inside, other=0.0).to(mean.dtype)
    tl.store(in_grad_ptr + place, grad.to(in_grad_ptr.dtype.element_ty), mask=inside)


def statistics(source, to):
    """Launch the mean and the biased variance of each channel, and the norm's scale and offset from them.

    source  [L, ..., C]
    to      where they go: an object with the fields of swamp_fast.engines.fused.cuda.halo.Statistics
    """
    lanes, pixels, channels = _extents(source)
    block, tile_pixels = _tile(source)
    tiles = triton.cdiv(pixels, tile_pixels)
    with torch.cuda.device_of(source):
        statistics_kernel[(tiles, triton.cdiv(channels, block), lanes)](
            *(source, target_of(to, lanes, tiles, channels), pixels, channels),
            EPS=to.eps,
            SUM=_sum_type(source),
            BLOCK_PIXELS=tile_pixels,
            BLOCK_CHANNELS=block,
            enable_fp_fusion=False,
            num_warps=8,
        )


def target_of(to, lanes, tiles, channels):
    """The Target of statistics that go to `to` (see `statistics`), with room for those of each tile."""
    tile_statistics = torch.empty(2, lanes, tiles, channels, dtype=to.mean.dtype, device=to.mean.device)
    affine = affine_of(to.weights, to.first_weight, to.first_bias)
    return Target(*tile_statistics.unbind(), rows(to.arrivals), norm_of(to), affine)


def scale_offset(to, channels):
    """Launch the scale and the offset of a norm from its mean and variance; `to` as `statistics` takes it."""
    with torch.cuda.device_of(to.mean):
        scale_offset_kernel[(len(to.mean),)](
            *(norm_of(to), affine_of(to.weights, to.first_weight, to.first_bias), channels),
            EPS=to.eps,
            BLOCK=triton.next_power_of_2(channels),
            enable_fp_fusion=False,
        )


def norm(source, side, out, to, relu):
    """Launch out = relu((source - mean) * scale + bias + side), with the mean and scale of `to` as `statistics` has it.

    side  [L, ..., C], or None
    relu  whether there is one
    """
    lanes, pixels, channels = _extents(source)
    with torch.cuda.device_of(source):
        norm_kernel[(triton.cdiv(pixels * channels, BLOCK), lanes)](
            *(source, side, out, norm_of(to), affine_of(to.weights, -1, to.first_bias), pixels, channels),
            RELU=relu,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


def norm_grad(source, out, out_grad, in_grad, side_grad, accumulate, accumulate_side, to, grads, relu, by_batch):
    """Launch the gradients of `norm`.

    source, out_grad  [L, ..., C]
    out               [L, ..., C], or None if it was never written; then relu's mask comes from scale and offset
    in_grad           [L, ..., C], written, or added to if accumulate; None if it isn't needed
    side_grad         [L, ..., C], written, or added to if accumulate_side; None if nothing was added, or isn't needed
    to                the norm, as `statistics` has it
    grads             [L, P'] added to: the gradients of the norm's weight and bias, which stand as they do in the bank
    by_batch          whether mean and variance are the batch's
    """
    lanes, pixels, channels = _extents(source)
    block, tile_pixels = _tile(source)
    tiles = triton.cdiv(pixels, tile_pixels)
    sums = torch.empty(2, lanes, tiles, channels, dtype=to.mean.dtype, device=source.device)
    slopes = torch.empty(2, lanes, channels, dtype=to.mean.dtype, device=source.device)
    affine_grads = affine_of(grads, to.first_weight, to.first_bias)
    with torch.cuda.device_of(source):
        norm_grad_sums_kernel[(tiles, triton.cdiv(channels, block), lanes)](
            *(source, out, out_grad, side_grad, sums, rows(to.arrivals), slopes, norm_of(to), affine_grads),
            *(pixels, channels, lanes),
            EPS=to.eps,
            BY_BATCH=by_batch,
            ADD_SIDE=accumulate_side,
            RELU=relu,
            SUM=_sum_type(source),
            BLOCK_PIXELS=tile_pixels,
            BLOCK_CHANNELS=block,
            enable_fp_fusion=False,
            num_warps=8,
        )
        if in_grad is None:
            return
        norm_grad_kernel[(triton.cdiv(pixels * channels, BLOCK), lanes)](
            *(source, out, out_grad, in_grad, slopes, norm_of(to), pixels, channels, lanes),
            ACCUMULATE=accumulate,
            RELU=relu,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


def _extents(source):
    """L, pixels and C of a map [L, ..., C]."""
    lanes, channels = source.shape[0], source.shape[-1]
    return lanes, source[0].numel() // channels, channels


def _tile(source):
    """How many channels and how many pixels one program takes."""
    block = max(16, min(64, triton.next_power_of_2(source.shape[-1])))
    return block, TILE_ELEMENTS // block // (2 if source.dtype == torch.float64 else 1)


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
