"""ParameterGroup: one table of the setting `groups`, checked when it is made."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

KEYS = ("params", "lr", "weight_decay")
EXAMPLE = '{params = ["*.bias"], weight_decay = 0.0}'


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate or weight decay of their own.

    params        patterns of parameter names, in the syntax of fnmatch
    lr            the factor of the learning rate; None for 1
    weight_decay  the weight decay; None if the group doesn't change it
    """

    params: tuple[str, ...]
    lr: float | None = None
    weight_decay: float | None = None

    def matches(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the group."""
        return any(fnmatchcase(name, pattern) for pattern in self.params)

    def to_dict(self) -> dict[str, Any]:
        """The table from which `group_of` makes this group."""
        table = {**asdict(self), "params": list(self.params)}
        return {key: value for key, value in table.items() if value is not None}


def groups_of(value: object) -> tuple[ParameterGroup, ...]:
    """Return the groups of the setting `groups`. Raises TypeError or ValueError unless it is a list of valid tables."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"`groups` must be a list of tables such as {EXAMPLE}, got {value!r}.")
    return tuple(_group_of(f"groups[{place}]", table) for place, table in enumerate(value))


def _group_of(name: str, table: object) -> ParameterGroup:
    if isinstance(table, ParameterGroup):
        table = table.to_dict()
    if not isinstance(table, Mapping):
        raise TypeError(f"`{name}` must be a table such as {EXAMPLE}, got {table!r}.")
    unknown = [key for key in table if key not in KEYS]
    if unknown:
        raise ValueError(f"`{name}` has the key {unknown[0]!r}, but the keys of a group are {', '.join(KEYS)}.")
    patterns = table.get("params")
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list | tuple) or not patterns or not all(isinstance(each, str) for each in patterns):
        raise ValueError(
            f"`{name}` needs params, a pattern of parameter names or a list of patterns such as {EXAMPLE}; got "
            f"params = {patterns!r}."
        )
    if not all(pattern.isprintable() and pattern for pattern in patterns):
        raise ValueError(f"`{name}`: patterns must be printable texts that aren't empty, got params = {patterns!r}.")
    rates = {key: _rate_of(name, key, table[key]) for key in KEYS[1:] if table.get(key) is not None}
    if not rates:
        raise ValueError(
            f"`{name}` sets nothing. Give it lr, a factor of the learning rate, or weight_decay, or remove it."
        )
    return ParameterGroup(tuple(patterns), **rates)


def _rate_of(name: str, key: str, value: object) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}`: {key} must be a number, got {value!r}.")
    try:
        rate = float(value)
    except OverflowError:
        rate = math.inf
    if not 0 <= rate < math.inf:
        raise ValueError(f"`{name}`: {key} must be at least 0 and finite, got {value}.")
    return rate
