"""pool and pool_grad: maximum and average over windows, given as ranges of rows and of columns, of all lanes.

Maps are [N, H, W, C], N all pictures of all lanes. In the backward pass each pixel of the input gathers from the
windows that hold it, in order, so no two programs write to one place.
"""

import torch
import triton
import triton.language as tl

from .argument_groups import Windows


@triton.jit
def pool_kernel(
    source_ptr, out_ptr, windows, height, width, out_height, out_width, channels,
    SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, i, j, c] = the maximum of source[n, y, x, c] over window (i, j), or the sum of it / divisors[i, j].

    source_ptr  [N, H, W, C]
    out_ptr     [N, OH, OW, C]  written
    windows     Windows
    SUM                         the type that is computed in

    A NaN in a window is its maximum. Grid: N * OH * OW, blocks of channels.
    """
    window = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = window % out_width
    i = window // out_width % out_height
    source_ptr += window // out_width // out_height * height * width * channels
    begin_y = tl.load(windows.rows_ptr + 2 * i)
    end_y = tl.load(windows.rows_ptr + 2 * i + 1)
    begin_x = tl.load(windows.columns_ptr + 2 * j)
    end_x = tl.load(windows.columns_ptr + 2 * j + 1)
    value = tl.zeros((BLOCK,), SUM)
    if windows.divisors_ptr is None:
        value += float("-inf")
    for y in range(begin_y, end_y):
        for x in range(begin_x, end_x):
            pixel = tl.load(source_ptr + (y * width + x) * channels + c, mask=c < channels, other=0.0).to(SUM)
            if windows.divisors_ptr is None:
                value = tl.where((pixel > value) | (pixel != pixel), pixel, value)
            else:
                value += pixel
    if windows.divisors_ptr is not None:
        value = value / tl.load(windows.divisors_ptr + i * out_width + j).to(SUM)
    tl.store(out_ptr + window * channels + c, value.to(out_ptr.dtype.element_ty), mask=c < channels)


@triton.jit
def pool_grad_kernel(
    source_ptr, out_ptr, in_grad_ptr, out_grad_ptr, windows, height, width, out_height, out_width, channels,
    ACCUMULATE: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """in_grad[n, y, x, c] = the sum over the windows (i, j) that hold (y, x) of their share of out_grad[n, i, j, c].

    That is out_grad / divisors[i, j] of an average, and of a maximum all of it for the first pixel that holds it.

    source_ptr    [N, H, W, C]    the pool's input
    out_ptr       [N, OH, OW, C]  its output
    in_grad_ptr   [N, H, W, C]    written, or added to if ACCUMULATE
    out_grad_ptr  [N, OH, OW, C]
    windows       Windows
    SUM                           the type that is computed in

    Grid: N * H * W, blocks of channels.
    """
    pixel = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    x = pixel % width
    y = pixel // width % height
    picture = pixel // width // height
    source_ptr += picture * height * width * channels
    out_ptr += picture * out_height * out_width * channels
    out_grad_ptr += picture * out_height * out_width * channels
    value = tl.load(source_ptr + (y * width + x) * channels + c, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), SUM)
    if ACCUMULATE:
        total += tl.load(in_grad_ptr + pixel * channels + c, mask=inside, other=0.0).to(SUM)
    # The windows that hold the pixel: rows of windows times columns of windows.
    first_i = tl.load(windows.row_windows_ptr + 2 * y)
    first_j = tl.load(windows.column_windows_ptr + 2 * x)
    across = tl.load(windows.column_windows_ptr + 2 * x + 1) - first_j
    for window in range((tl.load(windows.row_windows_ptr + 2 * y + 1) - first_i) * across):
        i = first_i + window // across
        j = first_j + window % across
        at = (i * out_width + j) * channels + c
        gradient = tl.load(out_grad_ptr + at, mask=inside, other=0.0).to(SUM)
        if windows.divisors_ptr is None:
            # Whether this pixel is the first in the window that holds the maximum.
            largest = tl.load(out_ptr + at, mask=inside, other=0.0)
            first = (value == largest) | ((value != value) & (largest != largest))
            begin_y = tl.load(windows.rows_ptr + 2 * i)
            begin_x = tl.load(windows.columns_ptr + 2 * j)
            wide = tl.load(windows.columns_ptr + 2 * j + 1) - begin_x
            for before in range((y - begin_y) * wide + x - begin_x):
                place = (begin_y + before // wide) * width + begin_x + before % wide
                earlier = tl.load(source_ptr + place * channels + c, mask=inside, other=0.0)
                first = first & (earlier != largest)
            total += tl.where(first, gradient, 0.0)
        else:
            total += gradient / tl.load(windows.divisors_ptr + i * out_width + j).to(SUM)
    tl.store(in_grad_ptr + pixel * channels + c, total.to(in_grad_ptr.dtype.element_ty), mask=inside)


def pool(source, out, windows):
    """Launch the pooling; `windows` is what `windows_of` gives."""
    (_, height, width, channels), (pictures, out_height, out_width, _) = source.shape, out.shape
    block = _block(channels)
    with torch.cuda.device_of(source):
        pool_kernel[(pictures * out_height * out_width, triton.cdiv(channels, block))](
            *(source, out, windows, height, width, out_height, out_width, channels),
            SUM=_sum_type(source),
            BLOCK=block,
            enable_fp_fusion=False,
            num_warps=1,
        )


def pool_grad(source, out, in_grad, out_grad, windows, accumulate):
    """Launch the gradient by the input."""
    (pictures, height, width, channels), (_, out_height, out_width, _) = source.shape, out.shape
    block = _block(channels)
    with torch.cuda.device_of(source):
        pool_grad_kernel[(pictures * height * width, triton.cdiv(channels, block))](
            *(source, out, in_grad, out_grad, windows, height, width, out_height, out_width, channels),
            ACCUMULATE=accumulate,
            SUM=_sum_type(source),
            BLOCK=block,
            enable_fp_fusion=False,
            num_warps=2,
        )


def windows_of(rows, columns, divisors, height, width, device):
    """The Windows of a pooling, from its ranges of rows and of columns; `divisors` is None for the maximum."""
    holding = [
        [_holding(ranges, place) for place in range(size)] for ranges, size in ((rows, height), (columns, width))
    ]
    tables = (torch.tensor(table, dtype=torch.int32, device=device) for table in (rows, columns, *holding))
    return Windows(*tables, None if divisors is None else torch.tensor(divisors, dtype=torch.float64, device=device))


def _holding(ranges, place):
    """The first and the last + 1 of the ranges that hold a place; begins and ends rise, so these follow each other."""
    numbers = [number for number, (begin, end) in enumerate(ranges) if begin <= place < end]
    return (numbers[0], numbers[-1] + 1) if numbers else (0, 0)


def _block(channels):
    return max(16, min(128, triton.next_power_of_2(channels)))


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
