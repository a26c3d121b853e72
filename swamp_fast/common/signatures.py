"""Finds out whether a callable takes the arguments with which it will be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def misfit(function: Callable[..., Any], names: Iterable[str]) -> str | None:
    """Why a function can't be called with keyword arguments of these names, and what it takes, as part of a sentence.

    None if the function can be called with them, or if its signature isn't known, as for some functions in C.
    """
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return None
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        known = [parameter.name for parameter in signature.parameters.values() if parameter.kind in NAMED]
        return f"{error}; it takes {', '.join(known) or 'no arguments'}"
    return None
