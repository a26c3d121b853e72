"""Figures of a run or a sweep as files, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swamp_fast.report.drawings import lines_over_density, save, score_over_density


def accuracy_over_sparsity(history: list[dict[str, Any]], path: Path, title: str = "") -> Path:
    """Accuracy on test over the density (which falls to the right): the average, and every particle as a dot.

    The format is that of the path's suffix. Raises ImportError without matplotlib, ValueError without accuracies.
    """
    rows = [row for row in history if row["accuracy"] is not None]
    if not rows:
        raise ValueError("there are no accuracies to draw: the run had no test data.")
    figure = score_over_density(rows, "accuracy")
    figure.suptitle(title, fontsize=10.5)
    return save(figure, path)


def accuracy_of_points(lines: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Accuracy of the averages over the density: a line a point of a sweep, by its label, of rows of its summary.

    The standard deviation over seeds is a band around it. Raises as accuracy_over_sparsity.
    """
    if not any(row.get("accuracy") is not None for rows in lines.values() for row in rows):
        raise ValueError("there are no accuracies to draw: the runs had no test data, or none was finished.")
    return save(lines_over_density(lines), path)
