"""Tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def csv_bytes(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> bytes:
    """Rows as CSV, one column per key in order of appearance, but those in `first` before all others."""
    text = io.StringIO()
    columns = dict.fromkeys([*first, *(name for row in rows for name in row)])
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
