"""Planes through the loss landscape: through three solutions, or along two random directions at one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swamp_fast.analysis.evaluator import SCORES, Analysis, Scores
from swamp_fast.particles.bank import Solution
from swamp_fast.report.figures import loss_contour

Grid = list[list[float]]  # [Y, X]


class OnOneLine(ValueError):
    """Three states on one line, so that no one plane is theirs."""


@dataclass(frozen=True)
class Plane:
    """Scores at the points of a grid.

    x [X], y [Y]        coordinates, in the units of the weights for a plane through solutions
    train_loss, ...     [Y, X]; None without test data, or without accuracies
    points, names       the coordinates [[x, y], ...] of the solutions that it goes through
    at_points           their scores, which the grid need not meet
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
        """Plain values, as `analyze` writes them."""
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
    """Losses over the plane through three states, on a grid of size x size points, as lanes.

    The axes are orthonormal in the space of all trained parameters: x from a to b, y towards c; `margin` is how far the
    grid goes beyond the three, as a share of their extent (as in Garipov et al. 2018, arXiv 1802.10026). BatchNorm is
    re-estimated at every point. Distances mean little between layers that BatchNorm makes blind to scale. Raises
    OnOneLine if the three lie on one line, as two particles and their average do.
    """
    solutions = [on.solution(state) for state in (a, b, c)]
    first, second, third = (each.weights.double() for each in solutions)
    along, other = second - first, third - first
    length = float(along.norm())
    across = other - (other @ along) / max(length, 1e-300) ** 2 * along
    height = float(across.norm())
    if min(length, height) <= 1e-6 * float(other.norm()):
        raise OnOneLine("the three states lie on one line, so no plane is theirs; take another, or use loss_barrier.")
    at = float(other @ along) / length
    corners = [[0.0, 0.0], [length, 0.0], [at, height]]
    x, y = (_axis([corner[i] for corner in corners], size, margin) for i in (0, 1))

    def shares(point: Sequence[float]) -> list[float]:
        of_c = point[1] / height
        of_b = (point[0] - of_c * at) / length
        return [1 - of_b - of_c, of_b, of_c]

    return _plane(on, solutions, x, y, corners, [shares(point) for point in _grid(x, y)], torch.eye(3), names)


def random_plane(
    on: Analysis,
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    size: int = 11,
    reach: float = 1.0,
    *,
    seed: int = 0,
) -> Plane:
    """Losses around a state along two random directions, each filter of which is as long as the state's.

    The coordinates go from -reach to reach, 1 being the filters' own length: "Visualizing the Loss Landscape of Neural
    Nets", Li et al. 2018, arXiv 1712.09913. Pruned weights stay 0; biases, norms and other parameters of one axis are
    not moved. BatchNorm is re-estimated at every point. Two directions of millions show little of the landscape.
    """
    layout, solution = on.problem.layout, on.solution(state)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.zeros(2, layout.P, dtype=torch.float64)
    mask = layout.mask_views(on.mask(masks).cpu())
    for entry in layout.entries:
        if len(entry.shape) < 2:
            continue
        own = torch.randn(2, *entry.shape, generator=generator, dtype=torch.float64)
        if entry.name in mask:
            own *= mask[entry.name]
        lengths = layout.view(solution.weights.cpu().double(), entry).flatten(1).norm(dim=1)  # [filters]
        scale = lengths / own.flatten(2).norm(dim=2).clamp_min(1e-300)
        layout.view(directions, entry).copy_(own * scale.view(2, -1, *(1,) * (len(entry.shape) - 1)))
    nothing = {name: torch.zeros_like(buffer) for name, buffer in solution.buffers.items()}
    moved = [Solution(own.to(on.problem.device, on.problem.dtype), nothing) for own in directions]
    axis = _axis([-reach, reach], size, 0.0)
    shares = [[1.0, *point] for point in _grid(axis, axis)]
    return _plane(on, [solution, *moved], axis, axis, [[0.0, 0.0]], shares, torch.tensor([[1.0, 0, 0]]), ["the state"])


def contour(plane: Plane, path: str | Path, what: str = "train_loss") -> Path:
    """A figure of a plane, in the format of the path's suffix; see report.figures.loss_contour."""
    return loss_contour(plane.to_dict(), Path(path), what)


def _plane(
    on: Analysis,
    solutions: list[Solution],
    x: list[float],
    y: list[float],
    points: list[list[float]],
    shares: list[list[float]],
    own: Tensor,
    names: Sequence[str],
) -> Plane:
    """Scores at the grid's points and, last, at the solutions', whose shares are `own` [S, K]."""
    every = torch.cat([torch.tensor(shares, dtype=torch.float64), own.double()])
    scores = on.mixed(solutions, every)
    grids = {}
    for what in SCORES:
        values = getattr(scores, what)
        grids[what] = None if values is None else [values[i * len(x) : (i + 1) * len(x)] for i in range(len(y))]
    at_points = Scores(**scores.part(range(len(shares), len(every))))
    return Plane(x, y, **grids, points=points, names=list(names), at_points=at_points)  # type: ignore[arg-type]


def _axis(values: list[float], size: int, margin: float) -> list[float]:
    if size < 2:
        raise ValueError(f"`size` must be at least 2 points an axis, got {size}.")
    low, high = min(values), max(values)
    beyond = margin * (high - low)
    return torch.linspace(low - beyond, high + beyond, size, dtype=torch.float64).tolist()


def _grid(x: list[float], y: list[float]) -> list[tuple[float, float]]:
    return [(each, other) for other in y for each in x]
