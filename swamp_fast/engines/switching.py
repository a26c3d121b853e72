"""SwitchingEngine: runs dense cycles on the eager engine, and cycles with a sparse enough mask on the fused engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.selection import Selection, flop_density
from swamp_fast.engines.trainer import LaneRunner
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.particles.schedule import Training


class SwitchingEngine:
    """Runs each cycle on one of two engines.

    The engine can change between two cycles, because a cycle inherits only a mask and solutions.

    engines  the kind of engine that ran each cycle so far, for the run's record; keys are "ticket" (for the ticket's
             training) and the cycles' numbers
    now      the engine of the current cycle
    say      prints a line
    """

    kind = "by density"
    joins = False

    def __init__(
        self, fused: FusedEngine, eager: EagerEngine, selection: Selection, say: Callable[[str], None]
    ) -> None:
        self.fused, self.eager, self.selection, self.say = fused, eager, selection, say
        self.engines: dict[str, str] = {}
        self.now: FusedEngine | EagerEngine = eager

    @property
    def name(self) -> str:
        """The value of the setting `engine` that selects this."""
        return self.selection.name

    @property
    def why(self) -> str:
        """Why these engines were selected."""
        return self.selection.why

    def under(self, mask: Tensor) -> FusedEngine | EagerEngine:
        """The engine for a mask [Q]."""
        density = flop_density(self.fused.problem, mask)
        return self.fused if density <= self.selection.fused_up_to else self.eager

    def spawn(
        self,
        start: Solution,
        mask: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        config: SwampConfig | None = None,
    ) -> ParticleBank:
        """As BankEngine.spawn."""
        before, self.now = self.now, self.under(mask)
        if before is not self.now:
            before.release()
            density = flop_density(self.fused.problem, mask)
            self.say(f"engine   {self.now.kind} from now on, at a FLOP density of {density:.3f}")
        earlier = () if cycle is None else ("ticket", *map(str, range(cycle)))
        self.engines = {key: self.engines[key] for key in earlier if key in self.engines}
        self.engines["ticket" if cycle is None else str(cycle)] = self.now.kind
        return self.now.spawn(start, mask, particles, cycle, config)

    def train(
        self,
        bank: ParticleBank,
        training: Training,
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As BankEngine.train."""
        return self.now.train(bank, training, on_step, on_epoch, state)

    def state(self) -> dict[str, Tensor]:
        """As BankEngine.state."""
        return self.now.state()

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> LaneRunner:
        """As BankEngine.side_by_side."""
        return self.now.side_by_side(weights, buffers, run)

    def describe(self) -> dict[str, Any]:
        """As BankEngine.describe."""
        return {
            "engine": self.kind,
            "name": self.name,
            "why": self.why,
            "engines": self.engines,
            "fused": self.fused.describe(),
            "eager": self.eager.describe(),
        }

    def replay(self, record: dict[str, Any]) -> None:
        """As BankEngine.replay."""
        self.engines = dict(record["engines"])
        self.fused.replay(record["fused"])
