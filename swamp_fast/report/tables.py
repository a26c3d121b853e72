"""Text tables for the console: the history of a run, and the last cycles of a sweep and of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swamp_fast.common.format import duration, percent
from swamp_fast.runs.result import SUMMARY_SCORES

HISTORY_COLUMNS = ("cycle", "density", "kept", "average", "particles", "ensemble", "MFLOP", "training", "cycle took")


def history_table(history: list[dict[str, Any]]) -> str:
    """The history of a run, one row per cycle: density, kept weights, test accuracies, FLOPs per sample, and times."""
    return _aligned([HISTORY_COLUMNS, *(_history_cells(row) for row in history)])


def summary_table(summary: list[dict[str, Any]], names: list[str]) -> str:
    """The last cycles of a sweep: test accuracy and its spread over seeds, one row per point of settings `names`."""
    # The cycles of a point come in order, so the row of its last cycle replaces the earlier ones.
    last = {tuple(str(row.get(name, "")) for name in names): row for row in summary}
    rows = [(*names, "density", "seeds", "accuracy")]
    for point, row in last.items():
        rows.append((*point, percent(row["density"]), str(row["seeds"]), spread(row)))
    return _aligned(rows)


def comparison_table(summary: list[dict[str, Any]], paired: list[dict[str, Any]], baseline: str) -> str:
    """The last cycle of a comparison, one row per method.

    The columns are test accuracy with its spread over seeds (loss if no method has an accuracy), the difference from
    the baseline in points with its 95 % interval, whether the method matches dense training, and the total cost.
    """
    last = max((row["cycle"] for row in summary), default=0)
    differences = {row["method"]: row for row in paired if row["cycle"] == last}
    score = "accuracy" if any(row["accuracy"] is not None for row in summary) else "loss"
    rows = [("method", "density", "seeds", score, f"minus {baseline}", "matches SGD", "SWA", "epochs", "took")]
    for row in summary:
        if row["cycle"] == last:
            matching = ({None: "–", True: "yes", False: "no"}[row[name]] for name in ("matching_sgd", "matching_swa"))
            cost = f"{row['particle_epochs']:,.0f}", duration(row["seconds"])
            scores = percent(row["density"]), str(row["seeds"]), spread(row, score)
            rows.append((row["method"], *scores, _difference(differences.get(row["method"])), *matching, *cost))
    return _aligned(rows)


def spread(row: Mapping[str, Any], score: str = "accuracy") -> str:
    """A score in a row of a summary as "mean ± standard deviation"; only the mean if there is one seed."""
    mean, deviation = row.get(score), row.get(f"{score}_std")
    if mean is None:
        return "–"
    is_fraction = score in SUMMARY_SCORES and score != "loss"
    scale, unit, decimals = (100, " %", 2) if is_fraction else (1, "", 4)
    return " ± ".join(f"{value * scale:.{decimals}f}" for value in (mean, deviation) if value is not None) + unit


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    text = f"{row['difference'] * 100:+.2f}"
    return text if row["low"] is None else f"{text} ({row['low'] * 100:+.2f} … {row['high'] * 100:+.2f})"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Join rows into text, with columns aligned to the right and the first row underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _history_cells(row: dict[str, Any]) -> tuple[str, ...]:
    particles = row["particle_accuracy"]
    return (
        str(row["cycle"]),
        percent(row["density"]),
        f"{row['kept']:,}",
        percent(row["accuracy"]),
        f"{min(particles) * 100:.2f} … {max(particles) * 100:.2f} %" if particles else "–",
        percent(row["ensemble_accuracy"]),
        f"{row['flops'] / 1e6:.2f}",
        duration(row["train_seconds"]),
        duration(row["seconds"]),
    )
