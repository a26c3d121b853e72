"""How long must a ticket train to be a matching ticket? The barrier between two children of each candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from torch import nn

from swamp_fast.analysis.connectivity import POINTS_ADVICE, Path, loss_barrier
from swamp_fast.analysis.evaluator import NEUTRAL_SETTINGS, Analysis, particles
from swamp_fast.common.checked import checked, checked_count, checked_list
from swamp_fast.common.format import percent
from swamp_fast.common.warn import warn_user
from swamp_fast.config import SwampConfig
from swamp_fast.data.labels import Labels
from swamp_fast.driver import fast_swamp
from swamp_fast.problem.arguments import Forward, Loss, Transform
from swamp_fast.problem.prunable import Prunable

MAX_ERROR_GAP = 0.05  # children whose error exceeds that of the best candidate's by more count as hardly trained


@dataclass(frozen=True)
class TicketStability:
    """How stable each candidate for T0 is, the number of epochs that the ticket is trained for.

    paths    per candidate, the path between its two children; its test scores are on validation data
    epsilon  the highest error barrier that counts as stable
    """

    candidates: list[int]
    paths: list[Path]
    epsilon: float

    @property
    def barriers(self) -> list[float]:
        """The error barrier of each candidate on validation data, measured from the mean of the ends, as a fraction."""
        return [path.barrier("test_error", "mean") for path in self.paths]

    @property
    def stable(self) -> list[int]:
        """The candidates that are stable together with all later ones; empty if the last candidate is not stable."""
        stable: list[int] = []
        for epochs, barrier in zip(self.candidates[::-1], self.barriers[::-1], strict=True):
            if not barrier < self.epsilon:  # NaN is not stable
                break
            stable.insert(0, epochs)
        return stable

    @property
    def recommended(self) -> int | None:
        """The smallest stable T0 whose children are about as good as the best candidate's; None if there is none.

        The barrier between much worse children says little, because hardly trained networks are trivially connected.
        """
        return next((epochs for epochs in self.stable if self._gap(epochs) <= MAX_ERROR_GAP), None)

    def _gap(self, epochs: int) -> float:
        """By how much the error of a candidate's children exceeds that of the best candidate's."""
        return self.errors[self.candidates.index(epochs)] - min(self.errors)

    @property
    def errors(self) -> list[float]:
        """The error of each candidate on validation data, averaged over both children, as a fraction."""
        on_path = [path.of("test_error") for path in self.paths]
        return [(errors[0] + errors[-1]) / 2 for errors in on_path]

    @property
    def warning(self) -> str | None:
        """Why the smallest stable T0 is not the recommended one; None if it is, or if there is none."""
        if not self.stable or self.stable[0] == self.recommended:
            return None
        smallest = self.stable[0]
        return (
            f"T0 = {smallest} is stable, but its children have an error {self._gap(smallest) * 100:.1f} points above "
            "that of the best candidate's, on validation data: networks that are hardly trained are trivially "
            "connected, so it is not recommended. Training for more epochs would show more."
        )

    def table(self) -> str:
        """A text table: one line per candidate, the recommendation, and the warning if there is one."""
        lines = [f"{'T0':>5}  {'barrier, error':>14}  {'children err':>12}"]
        for epochs, barrier, error in zip(self.candidates, self.barriers, self.errors, strict=True):
            lines.append(f"{epochs:>5}  {percent(barrier):>14}  {percent(error):>12}")
        if self.recommended is None:
            lines.append(f"recommended: none; the last candidate's barrier is not below {percent(self.epsilon)}")
        else:
            lines.append(
                f"recommended: T0 = {self.recommended}; from this T0 on, all barriers are below {percent(self.epsilon)}"
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

    If the barrier is about 0, training from the ticket is stable to the randomness of SGD, so the ticket is a matching
    ticket (Frankle et al. 2020, arXiv 1912.05671, section 3; their threshold is 2 % error).

    Args:
        val: validation data, or a fraction of `train`.
        candidates: values of T0, the number of epochs that the ticket trains at a constant rate. All candidates use one
            seed, so a longer ticket continues a shorter one.
        epsilon: the error barrier, a fraction, below which a candidate is stable.
        points: the number of points on each path.
        samples: as for Analysis.
        model, train, forward, loss, transform, prunable, config, settings: as for fast_swamp. By default children are
            averaged by SWA, as particles are; average="none" compares SGD's last iterates instead, as in the paper.

    A candidate costs T0 + 2 x epochs of training. With a `run_dir`, finished trainings are not repeated. One pair of
    children is only one sample, so near the threshold try other seeds too.

    Raises ValueError without validation data or accuracies, and TypeError or ValueError for other arguments that don't
    fit, before anything is trained. A T0 whose children have an
    error more than 5 points above that of the best candidate's is never recommended, because hardly trained networks
    are trivially connected; a warning says so.
    """
    if val is None:
        raise ValueError(
            "the ticket is chosen on validation data: pass `val`, either data or a fraction of train such as 0.1."
        )
    counts = [checked_count("candidates", epochs, 0) for epochs in checked_list("candidates", candidates, int)]
    epsilon, points = checked("epsilon", epsilon, float, 0, 1), checked_count("points", points, 3, advice=POINTS_ADVICE)
    base, ordered = SwampConfig.of(config, settings), sorted(set(counts))
    common: dict[str, Any] = {"val": val, "forward": forward, "loss": loss, "prunable": prunable}
    loader = {name: settings[name] for name in ("batch_size",) if name in settings}
    on = Analysis(model, train, config=base, samples=samples, **common, **loader)
    assert on.problem.val is not None  # `val` was passed
    if not isinstance(on.problem.val.labels, Labels):
        raise ValueError(f"error barriers need classification, but {on.problem.val.labels}; see loss_barrier.")
    on.test = on.problem.val
    paths = []
    for epochs in ordered:
        folder = None if base.run_dir is None else str(File(base.run_dir) / f"ticket_{epochs}")
        changes = {"particles": 2, "cycles": 0, "keep_particles": True, "ticket_epochs": epochs, "run_dir": folder}
        result = fast_swamp(
            model, train, transform=transform, config=base.replace(**changes, **NEUTRAL_SETTINGS), **common, **loader
        )
        first, second = particles(result)
        paths.append(loss_barrier(on, first, second, points))
    stability = TicketStability(ordered, paths, epsilon)
    if stability.warning is not None:
        warn_user(stability.warning)
    return stability
