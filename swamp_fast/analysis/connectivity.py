"""Are solutions linearly connected? Barriers on the line between two solutions, and losses in a convex hull."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor

from swamp_fast.analysis.evaluator import Analysis, Scores, averages, checked_states
from swamp_fast.common.checked import checked, checked_choice, checked_count
from swamp_fast.config import seed_of
from swamp_fast.runs.result import ANALYSIS_SCORES, SwampResult

# What a barrier can be measured from; see Path.barrier.
OVERS = ("max", "mean", "line")
POINTS_ADVICE = "A path needs both ends and one point between; 11 points are customary."


@dataclass(frozen=True, kw_only=True)
class Path(Scores):
    """Scores at the points (1 - t) a + t b of the straight line between states a and b, for t from 0 to 1."""

    t: list[float]

    def barrier(self, what: str = "train_loss", over: str = "max") -> float:
        """The barrier: how far a score rises along the path above its ends. NaN if the score is NaN anywhere.

        what  one of ANALYSIS_SCORES; errors are fractions
        over  what the rise is measured from. "max": the higher end; "mean": the mean of both ends (Frankle et al. 2020,
              arXiv 1912.05671); "line": the linear interpolation of the ends (Entezari et al. 2022, arXiv 2110.06296).
              All three give the same barrier if both ends have the same score.

        Raises ValueError for another `over`, and for a score that isn't available.
        """
        values = self.of(what)
        checked_choice("over", over, OVERS)
        if over == "max":
            return highest(values) - highest([values[0], values[-1]])
        if over == "mean":
            return highest(values) - (values[0] + values[-1]) / 2
        line = [(1 - t) * values[0] + t * values[-1] for t in self.t]
        return highest([value - on_line for value, on_line in zip(values, line, strict=True)])

    def barriers(self) -> dict[str, dict[str, float]]:
        """All barriers, as a dict: available score -> "max", "mean" or "line" -> barrier."""
        available = [score for score in ANALYSIS_SCORES if getattr(self, score) is not None]
        return {score: {over: self.barrier(score, over) for over in OVERS} for score in available}


@dataclass(frozen=True)
class BarrierMatrix:
    """The paths between all pairs (i, j), i < j, of `count` = N states."""

    count: int
    paths: dict[tuple[int, int], Path]

    def matrix(self, what: str = "train_loss", over: str = "max") -> list[list[float]]:
        """The barriers [N, N] between all pairs, with 0 on the diagonal; see Path.barrier."""
        barriers = [[0.0] * self.count for _ in range(self.count)]
        for (i, j), path in self.paths.items():
            barriers[i][j] = barriers[j][i] = path.barrier(what, over)
        return barriers


def highest(values: Sequence[float]) -> float:
    """The largest value, or NaN if any value is NaN. (max() ignores a NaN that isn't the first value.)"""
    return math.nan if any(map(math.isnan, values)) else max(values)


def loss_barrier(
    on: Analysis, a: Mapping[str, Tensor], b: Mapping[str, Tensor], points: int = 11, *, reestimate: bool = True
) -> Path:
    """Losses and errors at equally spaced points of the line between two states, evaluated as lanes.

    The barrier between two solutions is about 0 if they are linearly connected, as particles of one matching ticket
    should be (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671).
    BatchNorm is re-estimated at every point, because interpolated statistics (`reestimate=False`) show barriers where
    there are none. Fewer than 11 points may miss a barrier. Look at both loss and error, on training and test data.

    Raises ValueError for fewer than 3 points, TypeError or ValueError for a state that doesn't fit the model.
    """
    checked("on", on, Analysis)
    ends = [on.checked_state(name, state) for name, state in (("a", a), ("b", b))]
    return barrier_matrix(on, ends, points, reestimate=reestimate).paths[0, 1]


def barrier_matrix(
    on: Analysis, states: Sequence[Mapping[str, Tensor]], points: int = 11, *, reestimate: bool = True
) -> BarrierMatrix:
    """The paths between all pairs of N states, evaluated together as lanes; see loss_barrier.

    Raises ValueError for fewer than 3 points or 2 states, TypeError or ValueError for a state that doesn't fit the
    model.
    """
    states = checked_states(on, states, 2)
    points = checked_count("points", points, 3, advice=POINTS_ADVICE)
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    ends, pairs = torch.eye(len(states), dtype=torch.float64), list(combinations(range(len(states)), 2))
    between = [(1 - s) * ends[i] + s * ends[j] for i, j in pairs for s in t[1:-1]]
    shares = torch.cat([ends, torch.stack(between)])
    scores = on.mixed([on.solution(state) for state in states], shares, reestimate=reestimate)
    paths = {}
    for number, (i, j) in enumerate(pairs):
        begin = len(states) + number * (points - 2)
        rows = [i, *range(begin, begin + points - 2), j]
        paths[i, j] = Path(t=t.tolist(), **scores.part(rows))
    return BarrierMatrix(len(states), paths)


def consecutive(on: Analysis, result: SwampResult, points: int = 11, *, reestimate: bool = True) -> list[Path]:
    """The paths between the averages of consecutive cycles: does the solution stay connected when it is pruned?

    The ends have different masks: along the path, the weights that the next mask prunes shrink to 0.

    Raises ValueError for fewer than 3 points, and for a run of another model.
    """
    checked("on", on, Analysis)
    checked_count("points", points, 3, advice=POINTS_ADVICE)
    checked("reestimate", reestimate, bool)
    states = [state for state, _ in averages(result)]
    pairs = list(pairwise(states))
    # The sparsest pair comes first, because the density of the first evaluation decides which engine is used.
    return [loss_barrier(on, a, b, points, reestimate=reestimate) for a, b in pairs[::-1]][::-1]


@dataclass(frozen=True, kw_only=True)
class Hull(Scores):
    """Scores at M mixtures of N states, at the states themselves (corners) and at their mean (centre).

    mixtures  [M, N]  the share of each state in each mixture
    """

    mixtures: list[list[float]]
    corners: Scores
    centre: Scores


def hull(
    on: Analysis,
    states: Sequence[Mapping[str, Tensor]],
    mixtures: int = 32,
    *,
    seed: int = 0,
    reestimate: bool = True,
) -> Hull:
    """Losses at random mixtures of states, evaluated as lanes. The shares are uniform on the simplex: Dirichlet(1).

    If no mixture has a higher loss than the corners, all particles lie in one basin, which is the assumption behind
    averaging them (Choi et al. 2024, arXiv 2305.14852). With many particles, all mixtures lie near the centre and say
    little about the edge of the hull. BatchNorm is re-estimated at every point.

    Raises ValueError without states or mixtures, TypeError or ValueError for a state that doesn't fit the model.
    """
    states, mixtures = checked_states(on, states), checked_count("mixtures", mixtures, 1)
    seed = seed_of("seed", seed) % (1 << 64)  # NumPy takes no negative seeds
    count = len(states)
    drawn = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(count), mixtures))
    even = torch.full((1, count), 1 / count, dtype=torch.float64)
    shares = torch.cat([drawn, torch.eye(count, dtype=torch.float64), even])
    scores = on.mixed([on.solution(state) for state in states], shares, reestimate=reestimate)
    inside, corners = range(mixtures), range(mixtures, mixtures + count)
    return Hull(
        mixtures=drawn.tolist(),
        corners=Scores(**scores.part(corners)),
        centre=Scores(**scores.part([mixtures + count])),
        **scores.part(inside),
    )
