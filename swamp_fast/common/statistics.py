"""Means, their standard deviations and confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation of at least one value.

    The standard deviation of a single value is None. If a value isn't finite, the results are NaN instead of numbers.
    """
    if not all(map(math.isfinite, values)):
        return math.nan, None if len(values) == 1 else math.nan
    return statistics.fmean(values), None if len(values) == 1 else statistics.stdev(values)


def half_width(values: Sequence[float], level: float = 0.95) -> float:
    """Return half the width of the confidence interval of the mean of at least two values, by Student's t.

    It is NaN if a value isn't finite.
    """
    factor, finite = quantile(level, len(values) - 1), all(map(math.isfinite, values))
    return factor * statistics.stdev(values) / math.sqrt(len(values)) if finite else math.nan


def quantile(level: float, freedom: int) -> float:
    """Return the t such that a Student-distributed variable lies in [-t, t] with probability `level`.

    freedom  the degrees of freedom

    t is found by bisection on the finite series of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4. Raises ValueError for
    less than one degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"an interval needs at least two values, got {freedom + 1}.")
    low, high = 0.0, math.pi / 2  # bounds of atan(t / sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _share(angle: float, freedom: int) -> float:
    """Return the probability of Student's distribution in [-t, t], where angle = atan(t / sqrt(freedom))."""
    odd, cosine, total = freedom % 2, math.cos(angle), 0.0
    term = cosine if odd else 1.0
    for k in range(1 + odd, freedom, 2):
        total, term = total + term, term * cosine**2 * k / (k + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
