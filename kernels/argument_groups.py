"""The named tuples that group the arguments of the kernels.

Triton passes each field as a separate argument and specialises the kernel on it like on any other argument. Whether a
field is None is known at compile time, so a branch on `field is not None` costs nothing. Tuples of constants are passed
as `tl.constexpr`.
"""

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """A matrix with contiguous rows, such as weights [L, P] or masks [R, Q]."""

    ptr: Any
    stride: int  # elements from one row to the next


class Segments(NamedTuple):
    """The segments of each run's vector; the parameters of a segment share a learning rate and a weight decay."""

    ends_ptr: Any  # [R, S] int64, the index after each segment, nondecreasing; the last one is P
    number: int  # S


class Part(NamedTuple):
    """The same range of columns in each row of a matrix [L, columns]."""

    ptr: Any
    stride: int  # elements from one row to the next
    first: int  # the first column of the range


class Norm(NamedTuple):
    """The statistics of one norm layer, in four tensors [L, channels of all norm layers].

    The layer computes output = input * scale + offset.
    """

    mean_ptr: Any
    variance_ptr: Any  # biased: divided by the number of pixels
    scale_ptr: Any
    offset_ptr: Any
    stride: int  # elements from one lane to the next
    first: int  # the column of this layer's first channel


class Affine(NamedTuple):
    """The weight and bias of one norm layer in a compact bank [L, P'], or their gradients in a tensor of that shape."""

    ptr: Any
    stride: int  # elements from one lane to the next
    first_weight: int | None  # the column where the weight begins; None if the layer has no weight
    first_bias: int | None  # the column where the bias begins; None if the layer has no bias


class Target(NamedTuple):
    """Where a kernel writes the statistics of a map.

    Each program writes those of its tile. The last program to finish merges them into `norm`.
    """

    means_ptr: Any  # [L, tiles, C] the mean over each tile's pixels
    squares_ptr: Any  # [L, tiles, C] sums of squared differences from these means
    arrivals: Rows  # [L, blocks of channels] int32, the number of programs that have finished; 0 before and after
    norm: Norm
    affine: Affine


class Maps(NamedTuple):
    """The sizes of a kernel's source [L, B, height, width, C] and of its output [L, B, out_height, out_width, C']."""

    height: int
    width: int
    out_height: int
    out_width: int
    groups: int


class Window(NamedTuple):
    """Determines which pixels of its input a convolution reads for each pixel of its output."""

    taps: int  # the filter's height times its width
    kernel_x: int  # the filter's width
    step: int  # the convolution's stride
    pad_y: int
    pad_x: int
    dilation_y: int
    dilation_x: int


class Windows(NamedTuple):
    """The windows of a pooling layer, and for each input pixel the windows that contain it.

    Window (i, j) consists of a range of input rows, which depends on i, and a range of columns, which depends on j. The
    input pixel (y, x) lies in the windows of a range of output rows and a range of output columns. Every range is
    stored as its first number and its last number + 1.
    """

    rows_ptr: Any  # [OH, 2] int32, the input rows of the windows in an output row
    columns_ptr: Any  # [OW, 2] int32, the input columns of the windows in an output column
    row_windows_ptr: Any  # [H, 2] int32, the output rows whose windows contain an input row
    column_windows_ptr: Any  # [W, 2] int32, the output columns whose windows contain an input column
    divisors_ptr: Any  # [OH, OW] float64, the divisor of each window's sum; None for max pooling


class Product(NamedTuple):
    """How a kernel computes matrix products."""

    sum: Any  # the dtype of the accumulator
    precision: str  # how float32 factors are multiplied: "ieee" or "tf32"
    upcast: bool  # whether the factors are converted to float32 first


def rows(tensor: Any) -> Rows | None:
    """The Rows of a matrix; None for None."""
    return None if tensor is None else Rows(tensor, tensor.stride(0))


def segments_of(ends: Any) -> Segments | None:
    """The Segments of a tensor of ends [R, S]; None for None and for S = 1."""
    return None if ends is None or ends.shape[1] == 1 else Segments(ends, ends.shape[1])


def norm_of(statistics: Any) -> Norm:
    """The Norm of a norm layer.

    statistics  an object with the fields of swamp_fast.engines.fused.cuda.halo.Statistics
    """
    mean, variance, scale, offset = statistics.mean, statistics.variance, statistics.scale, statistics.offset
    return Norm(mean, variance, scale, offset, mean.stride(0), statistics.first)


def affine_of(bank: Any, first_weight: int, first_bias: int) -> Affine:
    """The Affine of a norm layer in a compact bank [L, P'].

    first_weight, first_bias  the columns where the weight and the bias begin; -1 if the layer has none
    """
    columns = (None if first < 0 else first for first in (first_weight, first_bias))
    return Affine(bank, bank.stride(0), *columns)
