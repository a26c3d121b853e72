"""The named tuples that group the arguments of the kernels.

Triton passes each field as an argument of its own and specialises it like any other. A field that is None is known at
compile time, so a branch on `field is not None` costs nothing. Tuples of constants are passed as `tl.constexpr`.
"""

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """A tensor [L, P], or [R, Q], whose rows are contiguous."""

    ptr: Any
    stride: int  # from row to row


class Part(NamedTuple):
    """A part of each row of a tensor [L, ...]."""

    ptr: Any
    stride: int  # from row to row
    first: int  # where the part begins in a row


class Norm(NamedTuple):
    """One norm's channels in four tensors [L, channels of all norms]."""

    mean_ptr: Any
    variance_ptr: Any  # biased
    scale_ptr: Any  # the norm is input * scale + offset
    offset_ptr: Any
    stride: int  # from lane to lane
    first: int  # where this norm's channels begin


class Affine(NamedTuple):
    """One norm's weight and bias in a bank [L, P'], or their gradients in one."""

    ptr: Any
    stride: int  # from lane to lane
    first_weight: int | None  # where the weight begins in a row; None without one
    first_bias: int | None


class Target(NamedTuple):
    """Where a map's statistics go: each tile's first, then, from the last program, those of the whole map."""

    means_ptr: Any  # [L, tiles, C] of a tile's pixels
    squares_ptr: Any  # [L, tiles, C] sums of squared differences from these means
    arrivals: Rows  # [L, blocks of channels] int32, zero before and after
    norm: Norm
    affine: Affine


class Maps(NamedTuple):
    """The sizes of a convolution's two maps, [L, B, height, width, C] and [L, B, out_height, out_width, C]."""

    height: int
    width: int
    out_height: int
    out_width: int
    groups: int


class Window(NamedTuple):
    """Which pixels a convolution reads for each of its outputs."""

    taps: int  # the kernel's height times its width
    kernel_x: int  # the kernel's width
    step: int
    pad_y: int
    pad_x: int
    dilation_y: int
    dilation_x: int


class Windows(NamedTuple):
    """The windows of a pooling, as ranges of rows times ranges of columns, and which of them hold each pixel."""

    rows_ptr: Any  # [OH, 2] int32, first row and last + 1 of the windows of an output row
    columns_ptr: Any  # [OW, 2] int32
    row_windows_ptr: Any  # [H, 2] int32, first and last + 1 of the output rows whose windows hold an input row
    column_windows_ptr: Any  # [W, 2] int32
    divisors_ptr: Any  # [OH, OW] float64, what sums are divided by; None for the maximum


class Product(NamedTuple):
    """How matrix products are computed."""

    sum: Any  # the type of the sums
    precision: str  # of products of float32: "ieee" or "tf32"
    upcast: bool  # whether factors are converted to float32 first


def rows(tensor: Any) -> Rows | None:
    """A tensor's rows; None stays None."""
    return None if tensor is None else Rows(tensor, tensor.stride(0))


def norm_of(statistics: Any) -> Norm:
    """The norm of `statistics`, which has the fields of swamp_fast.engines.fused.cuda.halo.Statistics."""
    mean, variance, scale, offset = statistics.mean, statistics.variance, statistics.scale, statistics.offset
    return Norm(mean, variance, scale, offset, mean.stride(0), statistics.first)


def affine_of(bank: Any, first_weight: int, first_bias: int) -> Affine:
    """A norm's weight and bias in a bank [L, P']; -1 is none."""
    places = (None if first < 0 else first for first in (first_weight, first_bias))
    return Affine(bank, bank.stride(0), *places)
