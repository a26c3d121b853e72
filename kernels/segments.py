"""What the optimizers' kernels share: the segments of a block of columns, and the rate of each column."""

import triton
import triton.language as tl


@triton.jit
def segments_of_block(segments, run, begin, end):
    """The numbers of the segments that hold the columns `begin` and `end` - 1 of a run's vector.

    segments  Segments [R, S]
    """
    first, last = 0, 0
    for number in range(segments.number - 1):
        stop = tl.load(segments.ends_ptr + run * segments.number + number)
        first += (stop <= begin).to(tl.int32)
        last += (stop < end).to(tl.int32)
    return first, last


@triton.jit
def rate_of_columns(rates_ptr, lane, columns, run, first, last, segments, dtype: tl.constexpr):
    """The rate of each of a block's columns, which lie in the segments `first` … `last`; one number without segments.

    rates_ptr  [L, S]              float64
    segments   Segments [R, S]; None for one segment, S = 1

    Most blocks lie in one segment. In others, each further segment gives its rate to the columns after its begin.
    """
    if segments is None:
        rate = tl.load(rates_ptr + lane).to(dtype)
    else:
        rates_ptr += lane * segments.number
        rate = tl.zeros(columns.shape, dtype) + tl.load(rates_ptr + first).to(dtype)
        for number in range(first, last):
            later = columns >= tl.load(segments.ends_ptr + run * segments.number + number)
            rate = tl.where(later, tl.load(rates_ptr + number + 1).to(dtype), rate)
    return rate
