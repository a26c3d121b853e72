"""Is the ticket late enough? Two children of each candidate, and the barrier between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from torch import nn

from swamp_fast.analysis.barrier import Path, loss_barrier
from swamp_fast.analysis.core import Analysis, particles
from swamp_fast.config import SwampConfig
from swamp_fast.driver import fast_swamp
from swamp_fast.probe import Forward, Loss
from swamp_fast.prunable import Prunable


@dataclass(frozen=True)
class TicketStability:
    """What each candidate T0, in epochs, came to.

    paths        between its two children; their test scores are those on validation data
    barriers     error barriers on validation data over the line between the ends; None without accuracies
    recommended  the smallest T0 whose barrier is below epsilon; None if there is none
    """

    candidates: list[int]
    paths: list[Path]
    epsilon: float

    @property
    def barriers(self) -> list[float] | None:
        """[candidates], fractions."""
        if self.paths[0].test_error is None:
            return None
        return [path.barrier("test_error", "mean") for path in self.paths]

    @property
    def recommended(self) -> int | None:
        """The smallest stable T0."""
        pairs = zip(self.candidates, self.barriers or [], strict=False)
        return next((epochs for epochs, barrier in pairs if barrier < self.epsilon), None)


def ticket_stability(
    model: nn.Module,
    train: object,
    val: object,
    candidates: Sequence[int],
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    transform: Callable[[Any], Any] | None = None,
    prunable: Prunable = None,
    config: SwampConfig | None = None,
    epsilon: float = 0.02,
    points: int = 11,
    samples: int | None = None,
    **settings: Any,
) -> TicketStability:
    """Train two dense children of every candidate ticket, and measure the barrier between them on validation data.

    The first T0 without a barrier is where training has become stable to the draws of SGD: a "matching ticket"
    (Frankle et al. 2020, arXiv 1912.05671, section 3; 2 % error is their threshold). Arguments are those of fast_swamp;
    `val` is data or a fraction of train. Candidates are in epochs of the ticket's training at a constant rate: of one
    seed the later tickets begin as the earlier ones. One pair of children is one draw: near the threshold take other
    seeds too. It costs T0 + 2 x epochs of training a candidate; with a `run_dir` it goes on from there.
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
    on.test = on.problem.val
    paths = []
    for epochs in wanted:
        folder = None if own.run_dir is None else str(File(own.run_dir) / f"ticket_{epochs}")
        changes = {"particles": 2, "cycles": 0, "keep_particles": True, "ticket_epochs": epochs, "run_dir": folder}
        result = fast_swamp(model, train, transform=transform, config=own.replace(**changes), **common, **loader)
        first, second = particles(result)
        paths.append(loss_barrier(on, first, second, points))
    return TicketStability(wanted, paths, epsilon)
