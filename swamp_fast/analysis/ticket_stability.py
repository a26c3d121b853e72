"""Is the ticket late enough? Two children of each candidate, and the barrier between them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from torch import nn

from swamp_fast.analysis.connectivity import Path, loss_barrier
from swamp_fast.analysis.evaluator import NEUTRAL_SETTINGS, Analysis, particles
from swamp_fast.common.format import percent
from swamp_fast.config import SwampConfig
from swamp_fast.driver import fast_swamp
from swamp_fast.problem.arguments import Forward, Loss, Transform
from swamp_fast.problem.prunable import Prunable

FAR = 0.05  # by which children may err more than the best


@dataclass(frozen=True)
class TicketStability:
    """What each candidate T0, in epochs, came to.

    paths        between its two children; their test scores are those on validation data
    barriers     error barriers on validation data over the mean of the ends
    errors       of its two children, the mean of both, on validation data
    recommended  the smallest T0 from which on all barriers are below epsilon; None if there is none
    warning      what speaks against it; None if nothing does
    """

    candidates: list[int]
    paths: list[Path]
    epsilon: float

    @property
    def barriers(self) -> list[float]:
        """[candidates], fractions."""
        return [path.barrier("test_error", "mean") for path in self.paths]

    @property
    def recommended(self) -> int | None:
        """The smallest T0 that is stable, and all later candidates too."""
        found = None
        for epochs, barrier in zip(self.candidates[::-1], self.barriers[::-1], strict=True):
            if not barrier < self.epsilon:  # NaN is not stable
                break
            found = epochs
        return found

    @property
    def errors(self) -> list[float]:
        """[candidates], fractions."""
        ends = [path.of("test_error") for path in self.paths]
        return [(each[0] + each[-1]) / 2 for each in ends]

    @property
    def warning(self) -> str | None:
        """Whether the children of the recommended T0 err far more than the best: barriers say little of those."""
        if self.recommended is None:
            return None
        error, best = self.errors[self.candidates.index(self.recommended)], min(self.errors)
        if error - best <= FAR:
            return None
        return (
            f"the children of T0 = {self.recommended} err {(error - best) * 100:.1f} points more on validation "
            "data than those of the best candidate: networks that are hardly trained are trivially connected. Train "
            "longer, or take a later T0."
        )

    def table(self) -> str:
        """A line a candidate, and what is recommended."""
        lines = [f"{'T0':>5}  {'barrier, error':>14}  {'children err':>12}"]
        for epochs, barrier, error in zip(self.candidates, self.barriers, self.errors, strict=True):
            lines.append(f"{epochs:>5}  {percent(barrier):>14}  {percent(error):>12}")
        if self.recommended is None:
            lines.append(f"recommended: none; the barrier of the last is not below {percent(self.epsilon)}")
        else:
            lines.append(
                f"recommended: T0 = {self.recommended}, from which on barriers are below {percent(self.epsilon)}"
            )
        return "\n".join(lines if self.warning is None else [*lines, f"warning: {self.warning}"])


def ticket_stability(
    model: nn.Module,
    train: object,
    val: object,
    candidates: Sequence[int],
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    transform: Transform | None = None,
    prunable: Prunable = None,
    config: SwampConfig | None = None,
    epsilon: float = 0.02,
    points: int = 11,
    samples: int | None = None,
    **settings: Any,
) -> TicketStability:
    """Train two dense children of every candidate ticket, and measure the barrier between them on validation data.

    The first T0 from which on there is no barrier is where training has become stable to the draws of SGD: a "matching
    ticket" (Frankle et al. 2020, arXiv 1912.05671, section 3; 2 % error is their threshold). Arguments are those of
    fast_swamp; `val` is data or a fraction of train. Candidates are in epochs of the ticket's training at a constant
    rate: of one seed the later tickets begin as the earlier ones. One pair of children is one draw: near the threshold
    take other seeds too. Children are averaged by SWA, as the particles of a run are by default; swa=False compares
    their last iterates, as the paper does. It costs T0 + 2 x epochs of training a candidate; with a `run_dir` it goes
    on from there.

    Raises ValueError without validation data or accuracies, before anything is trained. Warns if the children of the
    recommended T0 err more than 5 points more than the best candidate's: untrained networks are trivially connected.
    """
    if val is None:
        raise ValueError(
            "the ticket is chosen on validation data: pass `val`, data or a fraction of train such as 0.1."
        )
    if not candidates:
        raise ValueError("`candidates` must name epochs, such as [0, 2, 5, 10]; got none.")
    own, wanted = SwampConfig.of(config, settings), sorted(set(candidates))
    common: dict[str, Any] = {"val": val, "forward": forward, "loss": loss, "prunable": prunable}
    loader = {name: settings[name] for name in ("batch_size",) if name in settings}
    on = Analysis(model, train, config=own, samples=samples, **common, **loader)
    if not on.problem.classifies:
        raise ValueError("error barriers need a classification, and this model has no accuracies; see loss_barrier.")
    if points < 3:
        raise ValueError(f"`points` must be at least 3, both ends and one between; got {points}.")
    on.test = on.problem.val
    paths = []
    for epochs in wanted:
        folder = None if own.run_dir is None else str(File(own.run_dir) / f"ticket_{epochs}")
        changes = {"particles": 2, "cycles": 0, "keep_particles": True, "ticket_epochs": epochs, "run_dir": folder}
        result = fast_swamp(
            model, train, transform=transform, config=own.replace(**changes, **NEUTRAL_SETTINGS), **common, **loader
        )
        first, second = particles(result)
        paths.append(loss_barrier(on, first, second, points))
    found = TicketStability(wanted, paths, epsilon)
    if found.warning is not None:
        warnings.warn(found.warning, stacklevel=2)
    return found
