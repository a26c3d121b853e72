"""The segments of a run's vector, for the reference implementations of the ops that update a bank."""

from itertools import pairwise

from torch import Tensor


def segments_of(ends: Tensor | None, run: int, parameters: int) -> list[slice]:
    """The slices of a run's segments.

    ends        [R, S]  as `segment_ends` in swamp_fast/ops/masked_sgd.py
    parameters  P
    """
    stops = [parameters] if ends is None else ends[run].tolist()
    return [slice(begin, end) for begin, end in pairwise([0, *stops])]
