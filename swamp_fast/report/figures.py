"""Figures in separate files: accuracy of a run, accuracy of a sweep's points, and a loss plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swamp_fast.report.analysis_charts import draw_plane
from swamp_fast.report.canvas import save
from swamp_fast.report.charts import draw_accuracy_lines, draw_score


def accuracy_over_sparsity(history: list[dict[str, Any]], path: Path, title: str = "") -> Path:
    """Draw a run's test accuracy over density, with the average as a line and every particle as a dot.

    The suffix of the path chooses the file format.

    Raises ImportError without matplotlib, ValueError without accuracies.
    """
    rows = [row for row in history if row["accuracy"] is not None]
    if not rows:
        raise ValueError("there are no accuracies to draw: the run had no test data.")
    figure = draw_score(rows, "accuracy")
    figure.suptitle(title, fontsize=10.5)
    return save(figure, path)


def accuracy_of_points(lines: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Draw the test accuracy of averages over density, one line per point of a sweep or method of a comparison.

    lines  label -> rows of the point or method in the summary; a band shows the standard deviation over seeds

    Raises ImportError without matplotlib, ValueError without accuracies.
    """
    if not any(row.get("accuracy") is not None for rows in lines.values() for row in rows):
        raise ValueError("there are no accuracies to draw: the runs had no test data, or none was finished.")
    return save(draw_accuracy_lines(lines), path)


def loss_contour(plane: dict[str, Any], path: Path, score: str = "train_loss") -> Path:
    """Draw level lines of a score over a plane through solutions.

    plane  the plane as `analyze` writes it: x [X], y [Y], the score [Y, X], points [[x, y], ...] and their names

    The suffix of the path chooses the file format.

    Raises ImportError without matplotlib, ValueError without that score.
    """
    if plane.get(score) is None:
        raise ValueError(f"the plane has no {score} to draw.")
    scale, unit = (100, " %") if score.endswith("error") else (1, "")
    values = [[value * scale for value in row] for row in plane[score]]
    label = f"{score.replace('_', ' ')}{unit}"
    return save(draw_plane(plane["x"], plane["y"], values, plane["points"], plane["names"], label), path)
