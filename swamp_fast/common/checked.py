"""Checks the arguments of public functions. Messages name the argument, what was expected, and what was given."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

Kind = TypeVar("Kind")

MAX_COUNT = 1 << 24  # no count of points, probes or repeats makes sense beyond this
NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}


def checked(
    name: str, value: Any, kind: type[Kind], low: float = -math.inf, high: float = math.inf, *, advice: str = ""
) -> Kind:
    """Return an argument as an object of `kind`. For int and float, this is Python's own type of number.

    A bool doesn't count as a number, and a float must be finite. `low` and `high` are the lowest and highest number
    allowed, and `advice` follows the error's message. Raises TypeError for another type, and ValueError for a number
    out of range.
    """
    advice = f" {advice}" if advice else ""
    if not isinstance(value, NUMBERS.get(kind, kind)) or (kind in NUMBERS and isinstance(value, bool)):
        raise TypeError(f"`{name}` must be {_described(kind)}, got {shown(value)}.{advice}")
    given: Any = value
    if kind in NUMBERS:
        finite = kind is int or abs(given) <= sys.float_info.max  # math.isfinite fails for a huge int
        if not (finite and low <= given <= high):
            raise ValueError(f"`{name}` must {_limits(kind, low, high)}, got {shown(given)}.{advice}")
        given = int(given) if kind is int else float(given)
    checked_value: Kind = given
    return checked_value


def checked_count(name: str, value: Any, low: int, *, advice: str = "") -> int:
    """Return a number of points, probes, repeats or the like as an int of at least `low`; see `checked`."""
    return checked(name, value, int, low, MAX_COUNT, advice=advice)


def checked_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return an argument that must be one of several names. Raises ValueError for any other value."""
    if not isinstance(value, str) or value not in choices:
        named = ", ".join(f'"{choice}"' for choice in choices)
        got = f'"{value}"' if isinstance(value, str) else shown(value)
        raise ValueError(f"`{name}` must be one of {named}, got {got}.")
    return value


def checked_list(name: str, values: Any, kind: type[Kind], low: int = 1) -> list[Kind]:
    """Return an argument as a list of at least `low` objects of `kind`.

    Raises TypeError for anything but a list, tuple or other iterable, and for an entry of another type. Raises
    ValueError for too few entries.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping | Tensor):
        entries = "" if kind is object else f", each entry {_described(kind)}"
        raise TypeError(f"`{name}` must be a list{entries}; got {shown(values)}.")
    listed = list(values)
    if len(listed) < low:
        raise ValueError(f"`{name}` must have at least {low} {'entry' if low == 1 else 'entries'}, got {len(listed)}.")
    return [checked(f"{name}[{number}]", value, kind) for number, value in enumerate(listed)]


def checked_path(name: str, value: Any) -> Path:
    """Return the path of a file or folder; "~" is the user's home. Raises TypeError or ValueError for another value."""
    if not isinstance(value, str | Path):
        raise TypeError(f"`{name}` must be a path, as text or as a Path; got {shown(value)}.")
    text = str(value)
    if not text or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(
            f"`{name}` must be a path without null characters and surrogates, and not empty; got {shown(value)}."
        )
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"`{name}` names the home of an unknown user: {shown(value)}.") from error


def shown(value: object) -> str:
    """An argument as a message shows it: its value if that is short, else its type."""
    if isinstance(value, str | int | float | complex | bytes | list | tuple | dict | set | None):
        try:
            text = repr(value)
        except ValueError:  # Python refuses to write integers of thousands of digits
            text = ""
        if 0 < len(text) <= 60:
            return text
    return f"an object of type {type(value).__name__}"


def _limits(kind: type, low: float, high: float) -> str:
    """The numbers that are allowed, in words."""
    if math.isinf(low) and math.isinf(high):
        return "be finite"
    if math.isinf(high):
        return f"be at least {low:g}{' and finite' if kind is float else ''}"
    if high < MAX_COUNT:
        return f"lie in [{low:g}, {high:g}]"
    return f"be at least {low:g} and at most {high:,}"


def _described(kind: type) -> str:
    """A type in words, with its article."""
    words = {int: "an int", float: "a number", bool: "True or False", str: "a text", Mapping: "a dict"}
    words[Tensor] = "a tensor"
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    return words.get(kind, f"{article} {kind.__name__}")
