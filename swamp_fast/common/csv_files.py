"""Writes tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def csv_bytes(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> bytes:
    """Return rows as the content of a CSV file with one column per key; the columns in `first` come first."""
    content = io.StringIO()
    columns = dict.fromkeys([*first, *(name for row in rows for name in row)])
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue().encode()
