"""What does the loss look like around three solutions? Computes scores over the plane through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swamp_fast.analysis.evaluator import Analysis, Scores
from swamp_fast.common.checked import checked, checked_choice, checked_list, checked_path
from swamp_fast.report.figures import loss_contour
from swamp_fast.runs.result import ANALYSIS_SCORES

Grid = list[list[float]]  # [Y, X]

MAX_SIZE = 1 << 12  # points per axis
MAX_MARGIN = 1000.0
MIN_RELATIVE_HEIGHT = 1e-6  # three states closer to one line than this fraction of their distance span no plane


class OnOneLine(ValueError):
    """Raised if three states lie on one line, so that they span no plane."""


@dataclass(frozen=True)
class Plane:
    """Scores at the points of a grid in a plane through three solutions.

    x [X], y [Y]        coordinates, as distances between weights
    train_loss, ...     [Y, X] each; None if test data or accuracies are missing
    points, names       the coordinates [[x, y], ...] and names of the solutions that span the plane
    at_points           the scores of these solutions, which need not lie on the grid
    """

    x: list[float]
    y: list[float]
    train_loss: Grid
    train_error: Grid | None
    test_loss: Grid | None
    test_error: Grid | None
    points: list[list[float]]
    names: list[str]
    at_points: Scores

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, as plain values: the form in which `analyze` writes a plane."""
        return {**vars(self), "at_points": vars(self.at_points)}


def loss_plane(
    on: Analysis,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    c: Mapping[str, Tensor],
    size: int = 11,
    margin: float = 0.2,
    names: Sequence[str] = ("a", "b", "c"),
) -> Plane:
    """Losses over the plane through three states, on a grid of size x size points, evaluated as lanes.

    The axes are orthonormal in the space of all trained parameters: x points from a to b, y towards c. The grid extends
    beyond the three states by the fraction `margin` of their extent (as in Garipov et al. 2018, arXiv 1802.10026).
    BatchNorm is re-estimated at every point. Distances say little about layers before BatchNorm, whose scale is free.

    Raises OnOneLine if the three lie on one line, as two particles and their average do; ValueError for size < 2, a
    negative margin and another number of names; TypeError or ValueError for a state that doesn't fit the model.
    """
    checked("on", on, Analysis)
    size = checked(*("size", size, int), 2, MAX_SIZE, advice="It is the number of points per axis.")
    margin = checked("margin", margin, float, 0, MAX_MARGIN)
    names = checked_list("names", names, str)
    if len(names) != 3:
        raise ValueError(f"`names` must be three, one for each of a, b and c; got {len(names)}.")
    solutions = [on.solution(on.checked_state(name, state)) for name, state in (("a", a), ("b", b), ("c", c))]
    first, second, third = (solution.weights.double() for solution in solutions)
    along, other = second - first, third - first
    length = float(along.norm())
    across = other - (other @ along) / max(length, 1e-300) ** 2 * along
    height = float(across.norm())
    if min(length, height) <= MIN_RELATIVE_HEIGHT * float(other.norm()):
        raise OnOneLine("`a`, `b` and `c` lie on one line, so they span no plane; pass another or use loss_barrier.")
    c_along = float(other @ along) / length  # c's coordinate on the x axis
    corners = [[0.0, 0.0], [length, 0.0], [c_along, height]]
    x, y = (_axis([corner[i] for corner in corners], size, margin) for i in (0, 1))

    def shares(right: float, up: float) -> list[float]:
        """The coefficients of a, b and c that give the point (right, up) of the plane."""
        of_c = up / height
        of_b = (right - of_c * c_along) / length
        return [1 - of_b - of_c, of_b, of_c]

    grid = torch.tensor([shares(right, up) for up in y for right in x], dtype=torch.float64)
    scores = on.mixed(solutions, torch.cat([grid, torch.eye(3, dtype=torch.float64)]))
    grids = {}
    for score in ANALYSIS_SCORES:
        values = getattr(scores, score)
        grids[score] = None if values is None else [values[i * len(x) : (i + 1) * len(x)] for i in range(len(y))]
    at_points = Scores(**scores.part(range(len(grid), len(grid) + 3)))
    return Plane(x, y, **grids, points=corners, names=names, at_points=at_points)  # type: ignore[arg-type]


def contour(plane: Plane, path: str | Path, what: str = "train_loss") -> Path:
    """Draw the level lines of a score over a plane. The suffix of the path chooses the file format.

    what  one of ANALYSIS_SCORES

    Raises ValueError for another score or one that isn't available, and ImportError without matplotlib.
    """
    checked_choice("what", what, ANALYSIS_SCORES)
    return loss_contour(checked("plane", plane, Plane).to_dict(), checked_path("path", path), what)


def _axis(values: list[float], size: int, margin: float) -> list[float]:
    """Equally spaced coordinates (`size` of them) from the lowest to the highest value, with a margin on both sides."""
    low, high = min(values), max(values)
    beyond = margin * (high - low)
    return torch.linspace(low - beyond, high + beyond, size, dtype=torch.float64).tolist()
