"""Figures of a run or a sweep as files, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swamp_fast.report.drawings import lines_over_density, plane, save, score_over_density


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


def loss_contour(found: dict[str, Any], path: Path, what: str = "train_loss") -> Path:
    """Level lines of a score over a plane through solutions, as `analyze` writes it.

    found  x [X] and y [Y], the score [Y, X], points [[x, y], ...] and their names

    The format is that of the path's suffix. Raises ImportError without matplotlib, ValueError without that score.
    """
    if found.get(what) is None:
        raise ValueError(f"the plane has no {what} to draw.")
    unit, label = (100, "%") if what.endswith("error") else (1, "")
    values = [[value * unit for value in row] for row in found[what]]
    label = f"{what.replace('_', ' ')} {label}".strip()
    return save(plane(found["x"], found["y"], values, found["points"], found["names"], label), path)
