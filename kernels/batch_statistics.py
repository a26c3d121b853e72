"""statistics and scale_offset: each channel's mean and variance over a map, and the scale and offset of its norm layer.

Maps are [L, B, H, W, C], seen as [L, pixels, C]. Each program sums over one tile; then the last program sums over the
tiles in float64. So the order of a sum depends only on the map's sizes. The tiles' variances are merged from each
tile's mean and sum of squared differences from that mean. E[x^2] - E[x]^2 would cancel.

EPS is a compile-time constant because Triton would round a float argument to float32.
"""

import torch
import triton
import triton.language as tl

from .argument_groups import Target, affine_of, norm_of, rows

TILE_ELEMENTS = 4096  # pixels times channels of a tile
MERGE_ELEMENTS = tl.constexpr(2048)  # tiles times channels that the last program loads at once to merge them


@triton.jit
def write_scale_offset(mean, variance, norm, affine, lane, c, inside, EPS: tl.constexpr):
    """Store scale = weight / sqrt(variance + EPS) and offset = bias - mean * scale of one lane's norm layer.

    mean, variance  [C] of the channels c
    norm            Norm, of which scale and offset are written
    affine          Affine; a missing weight counts as 1, a missing bias as 0
    c               [C] a block of channel numbers
    inside          [C] bool, False where the block extends past the last channel
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
    """Count this program as finished; returns whether it is the last of `programs` to finish.

    The last program sees everything that the others stored before. It resets the counter to 0.
    """
    tl.debug_barrier()  # so that all threads have stored their results before this program counts as finished
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@triton.jit
def merge_statistics(
    to, lane, c, inside, tiles, tile_pixels, pixels, channels, EPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Merge the statistics of all tiles of a lane, and store those of the whole map. Only the last program calls this.

        mean     = sum over tiles of count * mean of the tile / pixels
        variance = sum over tiles of (squares of the tile + count * (mean of the tile - mean)^2) / pixels

    Here count is the number of pixels of the tile.

    to           Target
    c            [C] a block of channel numbers
    inside       [C] bool, False where the block extends past the last channel
    tile_pixels  pixels per tile; the last tile may have fewer

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    BLOCK_TILES: tl.constexpr = MERGE_ELEMENTS // BLOCK_CHANNELS
    means_ptr = to.means_ptr + lane * tiles * channels
    squares_ptr = to.squares_ptr + lane * tiles * channels
    # The mean over all tiles.
    total = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for begin in range(0, tiles, BLOCK_TILES):
        tile = begin + tl.arange(0, BLOCK_TILES)
        real = (tile < tiles)[:, None] & inside[None, :]
        count = tl.minimum(pixels - tile * tile_pixels, tile_pixels).to(tl.float64)
        tile_mean = tl.load(means_ptr + tile[:, None] * channels + c[None, :], mask=real, other=0.0).to(tl.float64)
        total += tl.sum(tl.where(real, tile_mean * count[:, None], 0.0), 0)
    mean64 = total / pixels
    # The sum of squared differences from that mean.
    total = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for begin in range(0, tiles, BLOCK_TILES):
        tile = begin + tl.arange(0, BLOCK_TILES)
        real = (tile < tiles)[:, None] & inside[None, :]
        count = tl.minimum(pixels - tile * tile_pixels, tile_pixels).to(tl.float64)
        tile_mean = tl.load(means_ptr + tile[:, None] * channels + c[None, :], mask=real, other=0.0).to(tl.float64)
        square = tl.load(squares_ptr + tile[:, None] * channels + c[None, :], mask=real, other=0.0).to(tl.float64)
        deviation = tile_mean - mean64[None, :]
        total += tl.sum(tl.where(real, square + deviation * deviation * count[:, None], 0.0), 0)
    # Store mean and variance, then the scale and offset that they determine.
    dtype = to.norm.mean_ptr.dtype.element_ty
    mean = mean64.to(dtype)
    variance = (total / pixels).to(dtype)
    at = lane * to.norm.stride + to.norm.first + c
    tl.store(to.norm.mean_ptr + at, mean, mask=inside)
    tl.store(to.norm.variance_ptr + at, variance, mask=inside)
    write_scale_offset(mean, variance, to.norm, to.affine, lane, c, inside, EPS)


@triton.jit
def tile_statistics(
    value, inside, to, lane, tile, tiles, c, c_inside, arrival, pixels, channels,
    EPS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store one tile's mean and sum of squared differences; the last program also merges the statistics of all tiles.

    value     [P, C] the tile's P pixels of C channels; 0 where `inside` is False
    inside    [P, C] bool, False where the tile extends past the last pixel or channel
    to        Target
    c         [C] the tile's channel numbers
    c_inside  [C] bool, False where the tile extends past the last channel
    arrival   the column of to.arrivals that counts the finished programs of these channels
    """
    count = tl.minimum(pixels - tile * BLOCK_PIXELS, BLOCK_PIXELS).to(value.dtype)
    mean = tl.sum(value, 0) / count
    deviation = tl.where(inside, value - mean[None, :], 0.0)
    first = lane * tiles * channels
    tl.store(to.means_ptr + first + tile * channels + c, mean, mask=c_inside)
    tl.store(to.squares_ptr + first + tile * channels + c, tl.sum(deviation * deviation, 0), mask=c_inside)
    if arrived_last(to.arrivals.ptr + lane * to.arrivals.stride + arrival, tiles):
        merge_statistics(to, lane, c, c_inside, tiles, BLOCK_PIXELS, pixels, channels, EPS, BLOCK_CHANNELS)


@triton.jit(do_not_specialize=["pixels"])
def statistics_kernel(
    source_ptr, to, pixels, channels,
    EPS: tl.constexpr, SUM: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute each channel's mean and biased variance, then the scale and offset of the norm layer.

        mean[l, c]     = sum over p of source[l, p, c] / pixels
        variance[l, c] = sum over p of (source[l, p, c] - mean[l, c])^2 / pixels
        scale, offset  as in write_scale_offset

    source_ptr  [L, pixels, C]
    to          Target, written: mean, variance, scale and offset [L, C]
    SUM         the dtype of a tile's sums

    Grid: tiles, blocks of channels, L.
    Source: torch.var_mean with correction=0; tiles are merged as in Chan, Golub and LeVeque 1983 (merge_statistics).
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
    """Compute the scale and offset of a norm layer whose mean and variance are given.

        scale[l, c]  = weight[l, c] / sqrt(variance[l, c] + EPS)
        offset[l, c] = bias[l, c] - mean[l, c] * scale[l, c]

    norm    Norm: mean and variance [L, C] are read; scale and offset [L, C] are written
    affine  Affine: weight and bias [L, C]; a missing weight counts as 1, a missing bias as 0

    Grid: L.
    Source: torch.nn.functional.batch_norm in evaluation mode.
    """
    lane = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    at = lane * norm.stride + norm.first + c
    mean = tl.load(norm.mean_ptr + at, mask=c < channels, other=0.0)
    variance = tl.load(norm.variance_ptr + at, mask=c < channels, other=1.0)
    write_scale_offset(mean, variance, norm, affine, lane, c, c < channels, EPS)


def statistics(source, to):
    """Compute each channel's mean and biased variance over a map, and the scale and offset of its norm layer.

    source  [L, ..., C]
    to      receives the results; an object with the fields of swamp_fast.engines.fused.cuda.halo.Statistics
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
    """The Target for writing a map's statistics to `to`, with newly allocated memory for those of each tile.

    to  as in `statistics`
    """
    tile_statistics = torch.empty(2, lanes, tiles, channels, dtype=to.mean.dtype, device=to.mean.device)
    affine = affine_of(to.weights, to.first_weight, to.first_bias)
    return Target(*tile_statistics.unbind(), rows(to.arrivals), norm_of(to), affine)


def scale_offset(to, channels):
    """Compute the scale and offset of a norm layer from its mean and variance.

    to  holds the mean and variance and receives the results; as in `statistics`
    """
    with torch.cuda.device_of(to.mean):
        scale_offset_kernel[(len(to.mean),)](
            *(norm_of(to), affine_of(to.weights, to.first_weight, to.first_bias), channels),
            EPS=to.eps,
            BLOCK=triton.next_power_of_2(channels),
            enable_fp_fusion=False,
        )


def extents_of(source):
    """The numbers of lanes, of pixels per lane, and of channels of a map [L, ..., C]."""
    lanes, channels = source.shape[0], source.shape[-1]
    return lanes, source[0].numel() // channels, channels


def tile_of(source):
    """The numbers of channels and of pixels in one program's tile of a map [L, ..., C]."""
    block = max(16, min(64, triton.next_power_of_2(source.shape[-1])))
    return block, TILE_ELEMENTS // block // (2 if source.dtype == torch.float64 else 1)


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
