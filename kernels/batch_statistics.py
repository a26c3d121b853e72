"""statistics and scale_offset: the mean and variance of each channel of a map, and the norm that follows from them.

Maps are [L, B, H, W, C], seen as [L, pixels, C]. Sums go tile by tile, then over the tiles in float64, so that their
order depends on the sizes alone. Variances are merged as (mean, sum of squares about it), never as E[x^2] - E[x]^2.

EPS is a constant because an argument of a kernel would be rounded to float32.
"""

import torch
import triton
import triton.language as tl

from .argument_groups import Target, affine_of, norm_of, rows

TILE_ELEMENTS = 4096  # pixels times channels of a tile
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


def statistics(source, to):
    """Launch the mean and the biased variance of each channel, and the norm's scale and offset from them.

    source  [L, ..., C]
    to      where they go: an object with the fields of swamp_fast.engines.fused.cuda.halo.Statistics
    """
    lanes, pixels, channels = extents_of(source)
    block, tile_pixels = tile_of(source)
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


def extents_of(source):
    """L, the number of pixels, and C of a map [L, ..., C]."""
    lanes, channels = source.shape[0], source.shape[-1]
    return lanes, source[0].numel() // channels, channels


def tile_of(source):
    """How many channels and how many pixels one program takes."""
    block = max(16, min(64, triton.next_power_of_2(source.shape[-1])))
    return block, TILE_ELEMENTS // block // (2 if source.dtype == torch.float64 else 1)


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
