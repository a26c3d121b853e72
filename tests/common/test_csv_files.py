"""CSV files that a spreadsheet opens."""

from __future__ import annotations

import csv
import io

from swamp_fast.common.csv_files import csv_bytes


def test_a_users_string_is_no_formula():
    rows = [{"=name": '=HYPERLINK("x")', "b": "@sum", "c": "+1", "d": "-1", "e": -1.5, "f": "plain", "g": "\t=1"}]
    (row,) = csv.DictReader(io.StringIO(csv_bytes(rows).decode()))
    assert row == {
        "'=name": '\'=HYPERLINK("x")', "b": "'@sum", "c": "'+1", "d": "'-1", "e": "-1.5", "f": "plain", "g": "'\t=1"
    }  # fmt: skip


def test_columns_come_in_the_requested_order():
    content = csv_bytes([{"b": 1}, {"a": 2, "b": None}], ["a"]).decode()
    assert content == "a,b\n,1\n2,\n"
