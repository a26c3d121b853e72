"""The eager engine: autograd over the user's own forward, lane by lane or folded; for any model and device."""

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
    """Runs lanes by autograd.

    why_not_fused  why the fused engine wasn't selected, where the rule would have preferred it
    evaluated      the weights and runner of the last `side_by_side`
    """

    kind = "eager"

    def __init__(self, problem: Problem, choice: Choice, why_not_fused: str | None = None) -> None:
        self.problem, self.choice, self.why_not_fused = problem, choice, why_not_fused
        self.why = f"{choice}" + (f"; not the fused engine: {why_not_fused}" if why_not_fused else "")
        self.trainer = None
        # On a CPU a folded lane's bits depend on the number of lanes beside it, and a run's bits must be its own.
        bits_depend_on_lanes = choice.way != "lanes" and problem.device.type == "cpu"
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
        """As BankEngine.spawn_runs; the bank's memory is reused from cycle to cycle."""
        lanes = len(starts) * len(particles)
        current = None if self.trainer is None else (self.trainer.bank.lanes, self.trainer.bank.configs)
        if self.trainer is None or current != (lanes, configs) or self.problem.probe.keeps_state:
            self.trainer = None  # frees the old bank before the new one is made
            self.trainer = eager_trainer(self.problem, self.choice, lanes, configs)
        self.trainer.bank.rewind_(starts, masks, particles, cycle)
        return self.trainer.bank

    def release(self) -> None:
        """As BankEngine.release."""
        self.trainer = self.evaluated = None

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> LaneRunner:
        """As BankEngine.side_by_side; memory is reused for models of the same shape."""
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
        """Models to copy where models keep their own state: the trained particles, and the first for the average."""
        if not self.problem.probe.keeps_state or self.trainer is None:
            return None
        return [*self.trainer.runner.modules, self.trainer.runner.modules[0]]

    def describe(self) -> dict[str, Any]:
        """As BankEngine.describe."""
        why_not = self.trainer.not_captured if self.trainer is not None else "nothing was trained"
        return {
            "engine": self.kind,
            "name": self.name,
            **asdict(self.choice),
            "why_not_fused": self.why_not_fused,
            "cuda_graph": why_not is None,
            "no_cuda_graph": why_not,
        }

    def replay(self, record: dict[str, Any]) -> None:
        """As BankEngine.replay; this engine chooses nothing after its start."""


def lane_runner(
    problem: Problem,
    choice: Choice,
    weights: Tensor,
    grads: Tensor | None,
    templates: list[nn.Module] | None = None,
) -> LaneByLane | Folded:
    """The runner of a choice over weights [L, P]; lane by lane, its modules may be copies of `templates`."""
    if choice.way == "lanes":
        return LaneByLane(problem, weights, grads, choice.channels_last, templates)
    return Folded(problem, weights, grads, choice.channels_last, choice.way == "fold_grouped")


def eager_trainer(
    problem: Problem, choice: Choice, lanes: int, configs: Sequence[SwampConfig] | None = None
) -> Trainer:
    """The trainer of a new bank of `lanes` lanes, of the problem's run or of several runs with their `configs`."""
    bank = ParticleBank(problem.layout, configs or [problem.config], lanes, problem.dtype, problem.device)
    grads = torch.zeros_like(bank.weights)
    return Trainer(problem, bank, grads, lane_runner(problem, choice, bank.weights, grads))
