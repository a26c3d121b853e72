"""EagerEngine: runs any model on any device by autograd, lane by lane or folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.config import SwampConfig
from swamp_fast.engines.bank_engine import BankEngine
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.fold import Folded
from swamp_fast.engines.lane_by_lane import LaneByLane
from swamp_fast.engines.trainer import LaneRunner, Trainer
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.problem.problem import Problem


class EagerEngine(BankEngine):
    """Runs lanes by autograd through the user's own forward.

    choice         the execution mode and memory format
    why_not_fused  the reason why the fused engine can't run the model; None if it can or was not considered
    evaluated      the weights and the runner of the last `side_by_side`
    """

    kind = "eager"

    def __init__(self, problem: Problem, choice: Choice, why_not_fused: str | None = None) -> None:
        self.problem, self.choice, self.why_not_fused = problem, choice, why_not_fused
        self.why = f"{choice}" + (f"; not the fused engine: {why_not_fused}" if why_not_fused else "")
        self.trainer = None
        # A run's bits must not depend on other runs. But on a CPU, a folded lane's bits depend on the number of lanes.
        bits_depend_on_lanes = choice.mode != "lanes" and problem.device.type == "cpu"
        self.joins = not problem.probe.keeps_state and not bits_depend_on_lanes
        self.evaluated: tuple[Tensor, LaneRunner] | None = None

    @property
    def name(self) -> str:
        """The value of the setting `engine` that selects this."""
        return self.choice.name

    def spawn_runs(
        self,
        starts: Sequence[Solution],
        masks: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        configs: Sequence[SwampConfig],
    ) -> ParticleBank:
        """As BankEngine.spawn_runs. Consecutive cycles reuse the bank's memory if lanes and settings are the same."""
        lanes = len(starts) * len(particles)
        current = None if self.trainer is None else (self.trainer.bank.lanes, self.trainer.bank.configs)
        if self.trainer is None or current != (lanes, configs) or self.problem.probe.keeps_state:
            self.trainer = None  # free the old bank before allocating the new one
            self.trainer = eager_trainer(self.problem, self.choice, lanes, configs)
        self.trainer.bank.rewind_(starts, masks, particles, cycle)
        return self.trainer.bank

    def release(self) -> None:
        """As BankEngine.release."""
        self.trainer = self.evaluated = None

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> LaneRunner:
        """As BankEngine.side_by_side. Consecutive calls reuse memory if their weights have the same shape."""
        fits = self.evaluated is not None and self.evaluated[0].shape == weights.shape
        if not fits or self.problem.probe.keeps_state:
            self.evaluated = None
            memory = weights.clone()
            self.evaluated = (memory, lane_runner(self.problem, self.choice, memory, None, self._templates()))
        assert self.evaluated is not None
        memory, runner = self.evaluated
        memory.copy_(weights)
        runner.set_buffers(buffers)
        for module in runner.modules:
            module.eval()
        return runner

    def _templates(self) -> list[nn.Module] | None:
        """The modules to copy for evaluation if the model keeps state in plain attributes; None otherwise.

        They are the trained particles' modules. The average solution gets the state of the first particle.
        """
        if not self.problem.probe.keeps_state or self.trainer is None:
            return None
        return [*self.trainer.runner.modules, self.trainer.runner.modules[0]]

    def describe(self) -> dict[str, Any]:
        """As BankEngine.describe."""
        why_not = self.trainer.not_captured if self.trainer is not None else "nothing was trained"
        return {
            "engine": self.kind,
            "name": self.name,
            **{"way" if name == "mode" else name: value for name, value in asdict(self.choice).items()},
            "why_not_fused": self.why_not_fused,
            "cuda_graph": why_not is None,
            "no_cuda_graph": why_not,
        }

    def replay(self, record: dict[str, Any]) -> None:
        """As BankEngine.replay. There is nothing to adopt: this engine makes no choice by measured time."""


def lane_runner(
    problem: Problem,
    choice: Choice,
    weights: Tensor,
    grads: Tensor | None,
    templates: list[nn.Module] | None = None,
) -> LaneByLane | Folded:
    """Make the runner for a choice, with weights [L, P] and gradients [L, P].

    templates  for lane by lane only: the modules to copy, one per lane; None for the problem's module
    """
    if choice.mode == "lanes":
        return LaneByLane(problem, weights, grads, choice.channels_last, templates)
    return Folded(problem, weights, grads, choice.channels_last, choice.mode == "fold_grouped")


def eager_trainer(
    problem: Problem, choice: Choice, lanes: int, configs: Sequence[SwampConfig] | None = None
) -> Trainer:
    """Make a trainer with a new bank of `lanes` lanes.

    configs  the settings of each run whose lanes share the bank; None for the problem's run alone
    """
    own_optimizer = problem.own_optimizer is not None
    bank = ParticleBank(
        problem.layout, configs or [problem.config], lanes, problem.dtype, problem.device, own_optimizer
    )
    grads = torch.zeros_like(bank.weights)
    return Trainer(problem, bank, grads, lane_runner(problem, choice, bank.weights, grads))
