"""norm and norm_grad: BatchNorm of all lanes, then an optional addition and ReLU; forward and backward.

Maps are [L, B, H, W, C], seen as [L, pixels, C]. batch_statistics.py computes the mean and scale that `norm` reads.
"""

import torch
import triton
import triton.language as tl

from .argument_groups import affine_of, norm_of, rows
from .batch_statistics import MERGE_ELEMENTS, arrived_last, extents_of, tile_of

BLOCK = 1024


@triton.jit(do_not_specialize=["pixels"])
def norm_kernel(source_ptr, side_ptr, out_ptr, norm, affine, pixels, channels, RELU: tl.constexpr, BLOCK: tl.constexpr):
    """out[l, p, c] = relu((source[l, p, c] - mean[l, c]) * scale[l, c] + bias[l, c] + side[l, p, c]).

    Without RELU there is no relu. A missing bias or side counts as 0.

    source_ptr  [L, pixels, C]
    side_ptr    [L, pixels, C]  or None
    out_ptr     [L, pixels, C]  written
    norm        Norm, of which mean and scale are read
    affine      Affine, of which the bias is read

    Grid: blocks of elements, L.
    Source: Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1.
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
        value = tl.where(value < 0, 0.0, value)  # keeps NaN
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "lanes"])
def norm_grad_sums_kernel(
    source_ptr, out_ptr, out_grad_ptr, side_grad_ptr, sums_ptr, arrivals, slopes_ptr, norm, affine_grads,
    pixels, channels, lanes, EPS: tl.constexpr, BY_BATCH: tl.constexpr, ADD_SIDE: tl.constexpr, RELU: tl.constexpr,
    SUM: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a norm layer's side, weight and bias, and the slopes that norm_grad_kernel needs.

    Each program sums over one tile of pixels. The last one to finish sums over the tiles. With g = out_grad where the
    output of relu is above 0 (0 elsewhere), centred = source - mean, and rstd = 1 / sqrt(variance + EPS):

        side_grad     = g
        weight_grad  += rstd * sum of g * centred
        bias_grad    += sum of g
        slopes[0]     = sum of g / pixels
        slopes[1]     = rstd^2 * sum of g * centred / pixels

    Without BY_BATCH, mean and variance do not depend on the source, and slopes are 0.

    source_ptr     [L, pixels, C]
    out_ptr        [L, pixels, C]    the output of relu; None to recompute its sign from scale and offset
    out_grad_ptr   [L, pixels, C]
    side_grad_ptr  [L, pixels, C]    written, or added to if ADD_SIDE; None if it is not needed
    sums_ptr       [2, L, tiles, C]  written: sums of g and of g * centred over each tile
    arrivals       Rows [L, blocks of channels]  int32, the number of programs that have finished; 0 before and after
    slopes_ptr     [2, L, C]         written
    norm           Norm
    affine_grads   Affine of the gradients, added to

    Grid: tiles, blocks of channels, L.
    Source: Ioffe and Szegedy 2015, arXiv 1502.03167, section 3, the gradients of algorithm 1.
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
    # Propagate the gradient through relu, and write that of the side.
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
        BLOCK_TILES: tl.constexpr = MERGE_ELEMENTS // BLOCK_CHANNELS
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
        # The slopes for norm_grad_kernel.
        if not BY_BATCH:
            sum_grad = tl.zeros((BLOCK_CHANNELS,), tl.float64)
            sum_centred = tl.zeros((BLOCK_CHANNELS,), tl.float64)
        dtype = slopes_ptr.dtype.element_ty
        at = lane * channels + c
        tl.store(slopes_ptr + at, (sum_grad / pixels).to(dtype), mask=c_inside)
        slope = (sum_centred / pixels * rstd * rstd).to(dtype)
        tl.store(slopes_ptr + lanes * channels + at, slope, mask=c_inside)


@triton.jit(do_not_specialize=["pixels", "lanes"])
def norm_grad_kernel(
    source_ptr, out_ptr, out_grad_ptr, in_grad_ptr, slopes_ptr, norm, pixels, channels, lanes,
    ACCUMULATE: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """in_grad = (g - slopes[0] - (source - mean) * slopes[1]) * scale, for every lane, pixel and channel.

    Here g is out_grad where the output of relu is above 0, and 0 elsewhere. Without RELU, g is out_grad.

    source_ptr    [L, pixels, C]
    out_ptr       [L, pixels, C]  the output of relu; None to recompute its sign from scale and offset
    out_grad_ptr  [L, pixels, C]
    in_grad_ptr   [L, pixels, C]  written, or added to if ACCUMULATE
    slopes_ptr    [2, L, C]       from norm_grad_sums_kernel
    norm          Norm

    Grid: blocks of elements, L.
    Source: Ioffe and Szegedy 2015, arXiv 1502.03167, section 3, with the terms of each sum collected.
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
    # Propagate the gradient through relu.
    if RELU:
        if out_ptr is not None:
            above = tl.load(out_ptr + place, mask=inside, other=0.0) > 0
        else:
            above = value * scale + tl.load(norm.offset_ptr + statistic, mask=inside, other=0.0) > 0
        gradient = tl.where(above, gradient, 0.0)
    # Propagate it through the norm. The slopes account for the mean and variance, which depend on every input.
    mean_grad = tl.load(slopes_ptr + lane * channels + c, mask=inside, other=0.0)
    slope = tl.load(slopes_ptr + (lanes + lane) * channels + c, mask=inside, other=0.0)
    grad = (gradient - mean_grad - (value - mean) * slope) * scale
    if ACCUMULATE:
        grad += tl.load(in_grad_ptr + place, mask=inside, other=0.0).to(mean.dtype)
    tl.store(in_grad_ptr + place, grad.to(in_grad_ptr.dtype.element_ty), mask=inside)


def norm(source, side, out, to, relu):
    """Compute out = relu((source - mean) * scale + bias + side), or the same without relu.

    source, out  [L, ..., C]
    side         [L, ..., C]; None for 0
    to           holds mean, scale and bias, as in batch_statistics.statistics
    relu         whether to apply relu
    """
    lanes, pixels, channels = extents_of(source)
    with torch.cuda.device_of(source):
        norm_kernel[(triton.cdiv(pixels * channels, BLOCK), lanes)](
            *(source, side, out, norm_of(to), affine_of(to.weights, -1, to.first_bias), pixels, channels),
            RELU=relu,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


def norm_grad(source, out, out_grad, in_grad, side_grad, accumulate, accumulate_side, to, grads, relu, by_batch):
    """Compute the gradients of `norm`.

    source, out_grad  [L, ..., C]
    out               [L, ..., C], the output of relu; None to recompute its sign from scale and offset
    in_grad           [L, ..., C], written, or added to if accumulate; None if it is not needed
    side_grad         [L, ..., C], written, or added to if accumulate_side; None if there is no side or no need for it
    to                holds the statistics, as in `norm`
    grads             [L, P'], to which the gradients of weight and bias are added, in the same columns as in the bank
    by_batch          whether mean and variance were computed from this batch
    """
    lanes, pixels, channels = extents_of(source)
    block, tile_pixels = tile_of(source)
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


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
