"""Linear mode connectivity: the barrier on the line between two solutions, and losses in the hull of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor

from swamp_fast.analysis.evaluator import SCORES, Analysis, Scores, averages
from swamp_fast.runs.result import SwampResult


@dataclass(frozen=True, kw_only=True)
class Path(Scores):
    """Scores at the points (1 - t) a + t b, 0 <= t <= 1, both ends included."""

    t: list[float]

    def barrier(self, what: str = "train_loss", over: str = "max") -> float:
        """How far the path rises; `what` is a score, of which errors are fractions.

        over  "max": the highest point minus the higher end; "mean": minus the mean of the ends (Frankle et al. 2020,
              1912.05671); "line": the highest rise above the straight line between them (Entezari et al. 2022,
              2110.06296). All are the same where the ends are equally good.

        NaN if any point's score is NaN.
        """
        values = self.of(what)
        if over == "max":
            return highest(values) - highest([values[0], values[-1]])
        if over == "mean":
            return highest(values) - (values[0] + values[-1]) / 2
        if over == "line":
            line = [(1 - t) * values[0] + t * values[-1] for t in self.t]
            return highest([value - on_line for value, on_line in zip(values, line, strict=True)])
        raise ValueError(f'`over` must be one of "max", "mean", "line", got "{over}".')

    def barriers(self) -> dict[str, dict[str, float]]:
        """All barriers of every score that there is."""
        there = [what for what in SCORES if getattr(self, what) is not None]
        return {what: {over: self.barrier(what, over) for over in ("max", "mean", "line")} for what in there}


@dataclass(frozen=True)
class BarrierMatrix:
    """The paths between all pairs i < j of N states."""

    count: int
    paths: dict[tuple[int, int], Path]

    def matrix(self, what: str = "train_loss", over: str = "max") -> list[list[float]]:
        """Barriers [N, N], 0 on the diagonal; see Path.barrier."""
        found = [[0.0] * self.count for _ in range(self.count)]
        for (i, j), path in self.paths.items():
            found[i][j] = found[j][i] = path.barrier(what, over)
        return found


def highest(values: Sequence[float]) -> float:
    """The largest, or NaN if there is one among them: max() passes over NaN that doesn't stand first."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def loss_barrier(
    on: Analysis, a: Mapping[str, Tensor], b: Mapping[str, Tensor], points: int = 11, *, reestimate: bool = True
) -> Path:
    """Losses and errors at equally spaced points of the line between two states, as lanes at once.

    The barrier is 0 between solutions of one linearly connected basin, which particles of one matching ticket should
    be (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671). BatchNorm
    is re-estimated at every point: with interpolated statistics (`reestimate=False`) a barrier stands where there is
    none. Fewer than 11 points may miss it; look at loss and error, on train and on test.
    """
    return barrier_matrix(on, [a, b], points, reestimate=reestimate).paths[0, 1]


def barrier_matrix(
    on: Analysis, states: Sequence[Mapping[str, Tensor]], points: int = 11, *, reestimate: bool = True
) -> BarrierMatrix:
    """As loss_barrier between every two of N states, the points of all paths as lanes together."""
    if points < 3:
        raise ValueError(f"`points` must be at least 3, both ends and one between; got {points}. 11 are customary.")
    if len(states) < 2:
        raise ValueError(f"a path needs two states, got {len(states)}.")
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
    """The path between each cycle's average and the next one's: do consecutive sparse solutions stay connected?

    The two have different supports: on the way the weights that the next mask prunes shrink to 0.
    """
    states = [state for state, _ in averages(result)]
    pairs = list(pairwise(states))
    # The sparsest first: at its density the engine is chosen.
    return [loss_barrier(on, a, b, points, reestimate=reestimate) for a, b in pairs[::-1]][::-1]


@dataclass(frozen=True, kw_only=True)
class Hull(Scores):
    """Scores at mixtures [M, N] of N states, at the states themselves (corners) and at their mean (centre)."""

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
    """Losses at mixtures of states whose shares are drawn evenly from the simplex, Dirichlet(1), all as lanes at once.

    If the loss within is no higher than at the corners the particles stand around one basin, the claim behind their
    averaging (Choi et al. 2024, arXiv 2305.14852). Of many particles even shares lie near the centre: the mixtures then
    say little of the hull's rim. BatchNorm is re-estimated at every point.
    """
    if mixtures < 1 or not states:
        raise ValueError(f"a hull needs states and mixtures, got {len(states)} and {mixtures}.")
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
