"""Figures of a run, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def accuracy_over_sparsity(history: list[dict[str, Any]], path: Path, title: str = "") -> Path:
    """Accuracy on test over the density (which falls to the right): the average, and every particle as a dot.

    The format is that of the path's suffix. Raises ImportError without matplotlib, ValueError without accuracies.
    """
    rows = [row for row in history if row["accuracy"] is not None]
    if not rows:
        raise ValueError("there are no accuracies to draw: the run had no test data.")
    figure, axes = _empty_figure()
    densities = [row["density"] * 100 for row in rows]
    for row, density in zip(rows, densities, strict=True):
        particles = [accuracy * 100 for accuracy in row["particle_accuracy"]]
        label = "particles" if row is rows[0] else None
        axes.plot([density] * len(particles), particles, ".", color="#d08770", alpha=0.7, label=label, zorder=2)
    ensemble = [row["ensemble_accuracy"] * 100 for row in rows]
    axes.plot(densities, ensemble, "--", color="#7a8699", linewidth=1, label="ensemble of the particles")
    average = [row["accuracy"] * 100 for row in rows]
    axes.plot(densities, average, "-o", color="#2e5eaa", markersize=4, label="average (SWAMP)", zorder=3)
    _name_axes(axes, densities)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
    return path


def accuracy_of_points(lines: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Accuracy of the averages over the density: a line a point of a sweep, by its label, of rows of its summary.

    The standard deviation over seeds is a band around it. Raises as accuracy_over_sparsity.
    """
    drawn = {label: [row for row in rows if row.get("accuracy") is not None] for label, rows in lines.items()}
    # Equal but for rounding is one tick.
    densities = sorted({float(f"{row['density'] * 100:.2g}") for rows in drawn.values() for row in rows}, reverse=True)
    if not densities:
        raise ValueError("there are no accuracies to draw: the runs had no test data, or none was finished.")
    figure, axes = _empty_figure()
    for label, rows in drawn.items():
        at, mean, spread = ([row[name] * 100 for row in rows] for name in ("density", "accuracy", "accuracy_std"))
        (line,) = axes.plot(at, mean, "-o", markersize=3, label=label)
        low, high = ([m + side * s for m, s in zip(mean, spread, strict=True)] for side in (-1, 1))
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    _name_axes(axes, densities)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left", fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _empty_figure() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: `pip install "swamp-fast[report]"`') from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _name_axes(axes: Any, densities: list[float]) -> None:
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(densities[:: max(1, len(densities) // 7)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g} %")
    axes.minorticks_off()
    axes.set_xlabel("weights kept")
    axes.set_ylabel("test accuracy, %")
