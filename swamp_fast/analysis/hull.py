"""The convex hull of solutions: is it a low-loss set?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swamp_fast.analysis.core import Analysis, Scores


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
