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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: `pip install "swamp-fast[report]"`') from error

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    densities = [row["density"] * 100 for row in rows]
    for row, density in zip(rows, densities, strict=True):
        particles = [accuracy * 100 for accuracy in row["particle_accuracy"]]
        label = "particles" if row is rows[0] else None
        axes.plot([density] * len(particles), particles, ".", color="#d08770", alpha=0.7, label=label, zorder=2)
    ensemble = [row["ensemble_accuracy"] * 100 for row in rows]
    axes.plot(densities, ensemble, "--", color="#7a8699", linewidth=1, label="ensemble of the particles")
    average = [row["accuracy"] * 100 for row in rows]
    axes.plot(densities, average, "-o", color="#2e5eaa", markersize=4, label="average (SWAMP)", zorder=3)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(densities[:: max(1, len(densities) // 7)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g} %")
    axes.minorticks_off()
    axes.set_xlabel("weights kept")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
    return path
