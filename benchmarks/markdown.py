"""Markdown tables. Imports the standard library only, for benchmarks that must start where torch may be broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table with one column per key of the first row."""
    columns = list(rows[0])
    lines = [_line(columns), "|" + "---|" * len(columns)]
    return lines + [_line([row[column] for column in columns]) for row in rows]


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
