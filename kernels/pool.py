"""pool and pool_grad: maximum and average over windows, given as ranges of rows and of columns, of all lanes.

Maps are [N, H, W, C], N all pictures of all lanes. Backward each pixel of the input gathers from the windows that hold
it, in order: no two programs write one place.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def pool_kernel(
    source,  # [N, H, W, C]
    out,  # [N, OH, OW, C]
    rows,  # [OH, 2] begin and end in the input
    columns,  # [OW, 2]
    divisors,  # [OH, OW], read unless MAXIMUM
    height,
    width,
    out_height,
    out_width,
    channels,
    MAXIMUM: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    window = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = window % out_width
    y = window // out_width % out_height
    source += window // out_width // out_height * height * width * channels
    begin_y = tl.load(rows + 2 * y)
    end_y = tl.load(rows + 2 * y + 1)
    begin_x = tl.load(columns + 2 * x)
    end_x = tl.load(columns + 2 * x + 1)
    value = tl.zeros((BLOCK,), SUM)
    if MAXIMUM:
        value += float("-inf")
    for row in range(begin_y, end_y):
        for column in range(begin_x, end_x):
            each = tl.load(source + (row * width + column) * channels + c, mask=c < channels, other=0.0).to(SUM)
            if MAXIMUM:
                value = tl.where((each > value) | (each != each), each, value)
            else:
                value += each
    if not MAXIMUM:
        value = value / tl.load(divisors + y * out_width + x).to(SUM)
    tl.store(out + window * channels + c, value.to(out.dtype.element_ty), mask=c < channels)


@triton.jit
def pool_grad_kernel(
    source,  # [N, H, W, C]
    out,  # [N, OH, OW, C]
    in_grad,  # [N, H, W, C]
    out_grad,  # [N, OH, OW, C]
    rows,  # [OH, 2]
    columns,  # [OW, 2]
    row_windows,  # [H, 2] first and last + 1 of the windows that hold a row
    column_windows,  # [W, 2]
    divisors,
    height,
    width,
    out_height,
    out_width,
    channels,
    MAXIMUM: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = c < channels
    x = pixel % width
    y = pixel // width % height
    picture = pixel // width // height
    source += picture * height * width * channels
    out += picture * out_height * out_width * channels
    out_grad += picture * out_height * out_width * channels
    own = tl.load(source + (y * width + x) * channels + c, mask=there, other=0.0)
    value = tl.zeros((BLOCK,), SUM)
    if ACCUMULATE:
        value += tl.load(in_grad + pixel * channels + c, mask=there, other=0.0).to(SUM)
    first_y = tl.load(row_windows + 2 * y)
    first_x = tl.load(column_windows + 2 * x)
    across = tl.load(column_windows + 2 * x + 1) - first_x
    for window in range((tl.load(row_windows + 2 * y + 1) - first_y) * across):
        oy = first_y + window // across
        ox = first_x + window % across
        at = (oy * out_width + ox) * channels + c
        gradient = tl.load(out_grad + at, mask=there, other=0.0).to(SUM)
        if MAXIMUM:  # all of it to the first place that holds the maximum
            most = tl.load(out + at, mask=there, other=0.0)
            first = (own == most) | ((own != own) & (most != most))
            begin_y = tl.load(rows + 2 * oy)
            begin_x = tl.load(columns + 2 * ox)
            wide = tl.load(columns + 2 * ox + 1) - begin_x
            for before in range((y - begin_y) * wide + x - begin_x):
                place = (begin_y + before // wide) * width + begin_x + before % wide
                each = tl.load(source + place * channels + c, mask=there, other=0.0)
                first = first & (each != most)
            value += tl.where(first, gradient, 0.0)
        else:
            value += gradient / tl.load(divisors + oy * out_width + ox).to(SUM)
    tl.store(in_grad + pixel * channels + c, value.to(in_grad.dtype.element_ty), mask=there)


def pool(source, out, windows):
    """Launch the pooling; `windows` is what `windows_of` gives."""
    (_, height, width, channels), (pictures, out_height, out_width, _) = source.shape, out.shape
    block = _block(channels)
    rows, columns, _, _, divisors = windows
    with torch.cuda.device_of(source):
        pool_kernel[(pictures * out_height * out_width, triton.cdiv(channels, block))](
            *(source, out, rows, columns, rows if divisors is None else divisors),
            *(height, width, out_height, out_width, channels),
            MAXIMUM=divisors is None,
            SUM=_sum_type(source),
            BLOCK=block,
            enable_fp_fusion=False,
            num_warps=1,
        )


def pool_grad(source, out, in_grad, out_grad, windows, accumulate):
    """Launch the gradient by the input."""
    (pictures, height, width, channels), (_, out_height, out_width, _) = source.shape, out.shape
    block = _block(channels)
    rows, columns, row_windows, column_windows, divisors = windows
    with torch.cuda.device_of(source):
        pool_grad_kernel[(pictures * height * width, triton.cdiv(channels, block))](
            *(source, out, in_grad, out_grad, rows, columns, row_windows, column_windows),
            *(rows if divisors is None else divisors, height, width, out_height, out_width, channels),
            MAXIMUM=divisors is None,
            ACCUMULATE=accumulate,
            SUM=_sum_type(source),
            BLOCK=block,
            enable_fp_fusion=False,
            num_warps=2,
        )


def windows_of(rows, columns, divisors, height, width, device):
    """The tables of a pooling: its ranges, which windows hold each row and column of the input, and the divisors."""
    held = [[_holding(ranges, place) for place in range(size)] for ranges, size in ((rows, height), (columns, width))]
    tables = [torch.tensor(each, dtype=torch.int32, device=device) for each in (rows, columns, *held)]
    return (*tables, None if divisors is None else torch.tensor(divisors, dtype=torch.float64, device=device))


def _holding(ranges, place):
    """The windows that hold a place stand together: their begins and ends rise."""
    found = [number for number, (begin, end) in enumerate(ranges) if begin <= place < end]
    return (found[0], found[-1] + 1) if found else (0, 0)


def _block(channels):
    return max(16, min(128, triton.next_power_of_2(channels)))


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
