"""The history as a table of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swamp_fast.common.format import duration, percent

COLUMNS = ("cycle", "density", "kept", "average", "particles", "ensemble", "MFLOP", "training", "cycle took")


def history_table(history: list[dict[str, Any]]) -> str:
    """A row a cycle: density, weights kept, accuracies on test, FLOPs of a sample's forward, and times."""
    return _table([COLUMNS, *(_cells(row) for row in history)])


def summary_table(summary: list[dict[str, Any]], names: list[str]) -> str:
    """A sweep's last cycles, a row a point of the settings `names`: accuracy on test, its spread over seeds."""
    last = {tuple(str(row.get(name, "")) for name in names): row for row in summary}  # its cycles are in order
    rows = [(*names, "density", "seeds", "accuracy")]
    for point, row in last.items():
        rows.append((*point, percent(row["density"]), str(row["seeds"]), spread(row)))
    return _table(rows)


def comparison_table(summary: list[dict[str, Any]], paired: list[dict[str, Any]], baseline: str) -> str:
    """A comparison's last cycle, a row a method: accuracy on test (the loss where no method has one) and its spread
    over seeds, the difference from the baseline with its 95 % interval in points, whether it matches dense training,
    and the cost so far.
    """
    last = max((row["cycle"] for row in summary), default=0)
    against = {row["method"]: row for row in paired if row["cycle"] == last}
    score = "accuracy" if any(row["accuracy"] is not None for row in summary) else "loss"
    rows = [("method", "density", "seeds", score, f"minus {baseline}", "matches SGD", "SWA", "epochs", "took")]
    for row in summary:
        if row["cycle"] == last:
            answers = ({None: "–", True: "yes", False: "no"}[row[name]] for name in ("matching_sgd", "matching_swa"))
            cost = f"{row['particle_epochs']:,.0f}", duration(row["seconds"])
            difference = _difference(against.get(row["method"]))
            begin = row["method"], percent(row["density"]), str(row["seeds"]), spread(row, score)
            rows.append((*begin, difference, *answers, *cost))
    return _table(rows)


def spread(row: Mapping[str, Any], score: str = "accuracy") -> str:
    """The mean of a summary's score and its standard deviation over seeds, which one seed has not."""
    mean, deviation = row.get(score), row.get(f"{score}_std")
    if mean is None:
        return "–"
    times, unit, digits = (1, "", 4) if score == "loss" else (100, " %", 2)
    shown = [f"{each * times:.{digits}f}" for each in (mean, deviation) if each is not None]
    return " ± ".join(shown) + unit


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    text = f"{row['difference'] * 100:+.2f}"
    return text if row["low"] is None else f"{text} ({row['low'] * 100:+.2f} … {row['high'] * 100:+.2f})"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    each = row["particle_accuracy"]
    return (
        str(row["cycle"]),
        percent(row["density"]),
        f"{row['kept']:,}",
        percent(row["accuracy"]),
        f"{min(each) * 100:.2f} … {max(each) * 100:.2f} %" if each else "–",
        percent(row["ensemble_accuracy"]),
        f"{row['flops'] / 1e6:.2f}",
        duration(row["train_seconds"]),
        duration(row["seconds"]),
    )
