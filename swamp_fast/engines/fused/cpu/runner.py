"""CpuLanes: the LaneRunner of the CPU kernels, which runs one lane after another through a Program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swamp_fast.data.store import Batch
from swamp_fast.engines.fused.buffers import Buffers
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cpu.program import Program
from swamp_fast.engines.fused.cpu.workspace import Rows
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.problem.problem import Problem


class CpuPrograms:
    """The programs for one mask [Q], made when a batch size first occurs."""

    def __init__(self, problem: Problem, plan: Plan, mask: Tensor, rows: Rows) -> None:
        self.problem, self.plan, self.compact, self.rows = problem, plan, Compact(problem.layout, mask), rows
        self.made: dict[tuple[int, bool], Program] = {}

    def of(self, samples: int, trains: bool) -> Program:
        """The program for batches of `samples` samples; a program made for training also serves evaluation."""
        for key in ((samples, True), (samples, trains)):
            if key in self.made:
                return self.made[key]
        storage = torch.bfloat16 if self.problem.config.precision == "bfloat16" else self.problem.dtype
        program = Program(self.plan, self.compact, samples, self.problem.dtype, storage, self.rows, trains)
        self.made[samples, trains] = program
        return program

    def measure(self, lanes: int) -> None:
        """Make the program for full batches now, so that what timing chooses is recorded before the first step."""
        self.of(self.problem.bounds[0][1], trains=True)

    @property
    def compacts(self) -> list[Compact]:
        """The compact form of each run; on a CPU there is always one run."""
        return [self.compact]

    def lanes(self, weights: Tensor, grads: Tensor | None, run_of_lane: Tensor | None = None) -> CpuLanes:
        """The runner of lanes with compact weights [L, P']; their gradients are added to grads [L, P']."""
        return CpuLanes(self.problem, self, weights, grads)


class CpuLanes:
    """Runs lanes with compact weights [L, P'] and adds their gradients to grads [L, P'].

    modules  one per lane, without weights; they hold the buffers
    """

    channels_last = False

    def __init__(self, problem: Problem, programs: CpuPrograms, weights: Tensor, grads: Tensor | None) -> None:
        self.problem, self.programs, self.compact_weights, self.grads = problem, programs, weights, grads
        self.running = Buffers(problem.template, programs.plan.norms, len(weights), problem.dtype)
        self.modules = self.running.modules

    @property
    def weights(self) -> Tensor:
        """See LaneRunner.weights; the compact weights are expanded to [L, P]."""
        return self.programs.compact.expand(self.compact_weights)

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """See LaneRunner.backward."""
        assert self.grads is not None
        losses = []
        for lane in range(len(self.modules)):
            key = step_keys[lane : lane + 1]
            inputs, targets = self.problem.particle_batch(*batch.lane(lane), key)
            program = self.programs.of(len(inputs), trains=True)
            outputs = self._run(program, lane, inputs, key).requires_grad_()
            loss = self.problem.losses(outputs.clone(), targets).mean()  # a loss may change its arguments
            (out_grad,) = torch.autograd.grad(loss, outputs)
            self.grads[lane].add_(program.backward(out_grad.to(self.grads.dtype)))
            losses.append(loss.detach())
        return torch.stack(losses)

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """See LaneRunner.outputs."""
        program = self.programs.of(len(inputs), trains=False)
        return [self._run(program, lane, inputs, None) for lane in range(len(self.modules))]

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """See LaneRunner.set_buffers."""
        self.running.write(buffers)

    def buffers(self) -> dict[str, Tensor]:
        """See LaneRunner.buffers."""
        return self.running.read()

    def _run(self, program: Program, lane: int, inputs: Tensor, key: Tensor | None) -> Tensor:
        """Return the outputs [B, ...] of a lane; in training mode this also updates its running statistics."""
        by_batch = self.running.by_batch
        if not by_batch:
            program.mean.copy_(self.running.mean[lane])
            program.variance.copy_(self.running.variance[lane])
        outputs = program.run(inputs, self.compact_weights[lane], by_batch, key)
        if by_batch:
            self.running.update(slice(lane, lane + 1), program.mean, program.variance * program.unbiased)
        return outputs
