"""pool and pool_grad: max pooling and average pooling of all lanes.

Maps are [N, H, W, C], where N counts the pictures of all lanes. In the backward pass each program computes the gradient
of one input pixel: it adds the contributions of all windows that contain the pixel, in a fixed order. So no two
programs write to the same address.
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
    """Compute max pooling if windows.divisors_ptr is None, otherwise average pooling.

        max:      out[n, i, j, c] = maximum over (y, x) in window (i, j) of source[n, y, x, c]
        average:  out[n, i, j, c] = (sum over (y, x) in window (i, j) of source[n, y, x, c]) / divisors[i, j]

    The maximum of a window that contains NaN is NaN.

    source_ptr  [N, H, W, C]
    out_ptr     [N, OH, OW, C]  written
    windows     Windows
    SUM         the dtype of the computation

    Grid: N * OH * OW, blocks of channels.
    Source: torch.nn.functional.max_pool2d and avg_pool2d.
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
    """Compute the gradient of a pooling layer's input: of max pooling if windows.divisors_ptr is None, else of average.

        in_grad[n, y, x, c] = sum over the windows (i, j) that contain (y, x) of share * out_grad[n, i, j, c]

    For average pooling, share is 1 / divisors[i, j]. For max pooling, it is 1 if (y, x) is the first pixel of the
    window with source[n, y, x, c] == out[n, i, j, c], and 0 otherwise.

    source_ptr    [N, H, W, C]    the layer's input
    out_ptr       [N, OH, OW, C]  the layer's output
    in_grad_ptr   [N, H, W, C]    written, or added to if ACCUMULATE
    out_grad_ptr  [N, OH, OW, C]
    windows       Windows
    SUM           the dtype of the computation

    Grid: N * H * W, blocks of channels.
    Source: the gradients of torch.nn.functional.max_pool2d and avg_pool2d.
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
    # Loop over the windows that contain the pixel: a range of output rows times a range of output columns.
    first_i = tl.load(windows.row_windows_ptr + 2 * y)
    first_j = tl.load(windows.column_windows_ptr + 2 * x)
    windows_across = tl.load(windows.column_windows_ptr + 2 * x + 1) - first_j
    for window in range((tl.load(windows.row_windows_ptr + 2 * y + 1) - first_i) * windows_across):
        i = first_i + window // windows_across
        j = first_j + window % windows_across
        at = (i * out_width + j) * channels + c
        gradient = tl.load(out_grad_ptr + at, mask=inside, other=0.0).to(SUM)
        if windows.divisors_ptr is None:
            # Is this pixel the first one in the window that equals the maximum?
            largest = tl.load(out_ptr + at, mask=inside, other=0.0)
            first = (value == largest) | ((value != value) & (largest != largest))
            begin_y = tl.load(windows.rows_ptr + 2 * i)
            begin_x = tl.load(windows.columns_ptr + 2 * j)
            window_width = tl.load(windows.columns_ptr + 2 * j + 1) - begin_x
            for before in range((y - begin_y) * window_width + x - begin_x):
                place = (begin_y + before // window_width) * width + begin_x + before % window_width
                earlier = tl.load(source_ptr + place * channels + c, mask=inside, other=0.0)
                first = first & (earlier != largest)
            total += tl.where(first, gradient, 0.0)
        else:
            total += gradient / tl.load(windows.divisors_ptr + i * out_width + j).to(SUM)
    tl.store(in_grad_ptr + pixel * channels + c, total.to(in_grad_ptr.dtype.element_ty), mask=inside)


def pool(source, out, windows):
    """Pool source [N, H, W, C] into out [N, OH, OW, C]; `windows` comes from `windows_of`."""
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
    """Compute the gradient with respect to the input; arguments as in pool_grad_kernel."""
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
    """The Windows of a pooling layer over maps of `height` x `width` pixels.

    rows, columns  for each output row or column, the first input row or column of its windows, and the last + 1
    divisors       [OH, OW], the divisors of average pooling; None for max pooling
    """
    containing = [
        [_containing(ranges, place) for place in range(size)] for ranges, size in ((rows, height), (columns, width))
    ]
    tables = (torch.tensor(table, dtype=torch.int32, device=device) for table in (rows, columns, *containing))
    return Windows(*tables, None if divisors is None else torch.tensor(divisors, dtype=torch.float64, device=device))


def _containing(ranges, place):
    """The number of the first range that contains a place, and the number of the last one + 1; (0, 0) if none does.

    The ranges are sorted by begin and by end, so those that contain the place are consecutive.
    """
    numbers = [number for number, (begin, end) in enumerate(ranges) if begin <= place < end]
    return (numbers[0], numbers[-1] + 1) if numbers else (0, 0)


def _block(channels):
    return max(16, min(128, triton.next_power_of_2(channels)))


def _sum_type(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
