"""The figure of a plane through the loss landscape, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swamp_fast.report.figures import _empty_figure


def loss_contour(plane: Mapping[str, Any], path: Path, what: str = "train_loss", title: str = "") -> Path:
    """Contours of a score over a plane, with the points that it was laid through, as `analyze` writes it.

    plane  x [X] and y [Y], the score [Y, X], points [[x, y], ...] and their names

    The format is that of the path's suffix. Raises ImportError without matplotlib, ValueError without that score.
    """
    if plane.get(what) is None:
        raise ValueError(f"the plane has no {what} to draw.")
    figure, axes = _empty_figure()
    unit = 100 if what.endswith("error") else 1
    values = [[value * unit for value in row] for row in plane[what]]
    filled = axes.contourf(plane["x"], plane["y"], values, levels=20, cmap="viridis_r")
    figure.colorbar(filled, ax=axes, label=what.replace("_", " ") + (", %" if unit == 100 else ""))
    for (x, y), name in zip(plane["points"], plane["names"], strict=True):
        axes.plot(x, y, "o", color="#d08770", markeredgecolor="white")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), color="white")
    axes.set_title(title)
    axes.set_aspect("equal")
    figure.savefig(path, dpi=150)
    return path
