"""Formats values for the user."""

from __future__ import annotations

import torch


def duration(seconds: float) -> str:
    """Format seconds as "42 s", "3:05 min" or "2:03 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def percent(fraction: float | None, digits: int = 2) -> str:
    """Format a fraction as "4.40 %", or None as a dash."""
    return "–" if fraction is None else f"{fraction * 100:.{digits}f} %"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def described(error: Exception) -> str:
    """Return an error's type and the first line of its message, for the end of a sentence."""
    line = (str(error).splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
