"""Writes tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def csv_bytes(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> bytes:
    """Rows as the content of a CSV file: one column per key, those in `first` before the others.

    A string that a spreadsheet would take for a formula gets a leading apostrophe, which makes it text there.
    """
    content = io.StringIO()
    columns = dict.fromkeys([*first, *(name for row in rows for name in row)])
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writerow({name: _as_text(name) for name in columns})
    writer.writerows({name: _as_text(value) for name, value in row.items()} for row in rows)
    return content.getvalue().encode()


def _as_text(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value
