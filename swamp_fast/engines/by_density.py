"""The eager engine for the dense cycles, and the fused one from the first cycle on in which it is faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from swamp_fast.bank import ParticleBank, Solution
from swamp_fast.config import SwampConfig
from swamp_fast.engines.eager import EagerEngine
from swamp_fast.engines.fused.engine import FusedEngine, seconds_of_steps
from swamp_fast.engines.trainer import Way
from swamp_fast.schedule import Training


class EngineByDensity:
    """Runs each cycle on one of two engines; all that a cycle takes from the one before it is a mask and the ticket.

    eager_seconds  of a step of one particle: what the fused engine is measured against, before a cycle, until it wins
    engines        the name of each cycle's engine ("ticket" for the ticket's); part of a run's state, so that resuming
                   replays it
    say            prints a line
    """

    name = "by density"
    joins = False

    def __init__(
        self,
        fused: FusedEngine,
        eager: EagerEngine,
        eager_seconds: float,
        engines: dict[str, str],
        why: str,
        say: Callable[[str], None],
    ) -> None:
        self.fused, self.eager, self.eager_seconds, self.engines = fused, eager, eager_seconds, engines
        self.why, self.say = why, say
        self.now: FusedEngine | EagerEngine = eager

    def spawn(
        self,
        start: Solution,
        mask: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        config: SwampConfig | None = None,
    ) -> ParticleBank:
        """As EagerEngine.spawn."""
        key = "ticket" if cycle is None else str(cycle)
        if key not in self.engines:
            self.engines[key] = self._faster(mask)
        fused = self.engines[key] == self.fused.name
        (self.eager if fused else self.fused).release()
        self.now = self.fused if fused else self.eager
        return self.now.spawn(start, mask, particles, cycle, config)

    def train(
        self,
        bank: ParticleBank,
        training: Training,
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As EagerEngine.train."""
        return self.now.train(bank, training, on_step, on_epoch, state)

    def state(self) -> dict[str, Tensor]:
        """As EagerEngine.state."""
        return self.now.state()

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> Way:
        """As EagerEngine.side_by_side."""
        return self.now.side_by_side(weights, buffers, run)

    def describe(self) -> dict[str, Any]:
        """What ran, how, and why."""
        return {
            "engine": self.name,
            "why": self.why,
            "engines": self.engines,
            "eager_seconds": self.eager_seconds,
            "fused": self.fused.describe(),
            "eager": self.eager.describe(),
        }

    def replay(self, there: dict[str, Any]) -> None:
        """As FusedEngine.replay."""
        self.engines = there["engines"]
        self.fused.replay(there["fused"])

    def _faster(self, mask: Tensor) -> str:
        if self.fused.name in self.engines.values():
            return self.fused.name
        problem = self.fused.problem
        seconds = seconds_of_steps(self.fused.anew(), problem, mask)
        if seconds >= self.eager_seconds:
            return self.eager.name
        figures = f"{seconds * 1e3:.1f} against {self.eager_seconds * 1e3:.1f} ms a step of one particle"
        self.say(f"engine   fused from here on: {figures}")
        return self.fused.name
