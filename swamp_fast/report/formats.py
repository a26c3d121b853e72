"""Functions that format numbers, settings and literals for the pages. Templates use some of them as filters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from swamp_fast.common import format as plain

DASH = "–"  # stands for a missing value


def percent(fraction: float | None, decimals: int = 2) -> str:
    """A fraction in per cent, with a no-break space before the % sign."""
    return plain.percent(fraction, decimals).replace(" ", "\N{NO-BREAK SPACE}")


def duration(seconds: float | None) -> str:
    """A duration in s, min or h, whichever suits its length."""
    return DASH if seconds is None else plain.duration(seconds)


def points(difference: float | None) -> str:
    """A difference of two fractions, in percentage points with a sign."""
    return DASH if difference is None else f"{difference * 100:+.2f}"


def significant(number: float | None) -> str:
    """A number with four significant digits."""
    return DASH if number is None else f"{number:.4g}"


def decimal(number: float | None) -> str:
    """A number with four decimals."""
    return DASH if number is None else f"{number:.4f}"


def grouped(number: float | None) -> str:
    """A number with commas between thousands."""
    return DASH if number is None else f"{number:,}"


def whole(number: float | None) -> str:
    """A number rounded to an integer, with commas between thousands."""
    return DASH if number is None else f"{number:,.0f}"


def millions(number: float | None) -> str:
    """A number in millions, with two decimals."""
    return DASH if number is None else f"{number / 1e6:.2f}"


def yes_or_no(answer: bool | None) -> str:
    """Yes or no in words; a dash if the answer is missing."""
    return DASH if answer is None else "yes" if answer else "no"


def words(value: Any) -> str:
    """The value of any setting, as readable text."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: DASH}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {words(part)}" for name, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(words, value))
    return significant(value) if isinstance(value, float) else f"{value}"


def python_literal(text: str) -> str:
    """A text as a Python string literal."""
    return json.dumps(text, ensure_ascii=False)
