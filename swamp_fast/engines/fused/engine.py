"""The fused engine: a Plan on this project's own kernels, with a new bank and new programs for each cycle's mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.engines.bank_engine import BankEngine
from swamp_fast.engines.fused.compact import CompactBank
from swamp_fast.engines.fused.cpu.runner import CpuLanes, CpuPrograms
from swamp_fast.engines.fused.cpu.workspace import Rows
from swamp_fast.engines.fused.cuda.narrow import channels_left
from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.cuda.runner import CudaLanes, CudaPrograms, lanes_in_cache
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.step_time import seconds_of_steps, timed_lanes
from swamp_fast.engines.trainer import Trainer
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.problem.problem import Problem


class FusedEngine(BankEngine):
    """Runs lanes by a plan on this project's own kernels.

    rows    by cycle ("ticket" for the ticket's): how many outputs share loads in each convolution. A stopwatch chooses;
            the run records it, so that a resumed run replays it
    launch  launches the kernels of csrc/cuda; None where only the Triton kernels run
    branch  on a GPU, the number of lanes in each group if groups that run in parallel measured faster; otherwise None
    """

    kind = name = "fused"

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        why: str,
        rows: dict[str, Rows],
        launch: Launch | None = None,
        branch: int | None = None,
    ) -> None:
        self.problem, self.plan, self.why, self.rows, self.launch = problem, plan, why, rows, launch
        self.branch = branch
        self.programs: CpuPrograms | CudaPrograms | None = None
        self.trainer = None
        self.joins = problem.device.type == "cuda"  # a program of the CPU kernels serves one mask only

    def spawn_runs(
        self,
        starts: Sequence[Solution],
        masks: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        configs: Sequence[SwampConfig],
    ) -> ParticleBank:
        """As BankEngine.spawn_runs; the bank and its programs are made for the masks (on a CPU, for a single one)."""
        self.release()  # before new memory is taken
        rows = self.rows.setdefault("ticket" if cycle is None else str(cycle), {})
        mask = masks if len(masks) > 1 else masks[0]
        self.programs = programs_of(self.problem, self.plan, mask, rows, self.launch, self.branch)
        bank = CompactBank(self.programs.compacts, configs, len(starts) * len(particles), self.problem.dtype)
        bank.rewind_(starts, masks, particles, cycle)
        grads = torch.zeros_like(bank.weights)
        self.programs.measure(bank.lanes)
        runner = self.programs.lanes(bank.weights, grads, bank.run_of_lane)
        self.trainer = Trainer(self.problem, bank, grads, runner)
        return bank

    def bank_key(self, mask: Tensor) -> object:
        """As BankEngine.bank_key: the program is made for the channels that a mask leaves alive."""
        return channels_left(self.plan, self.problem.layout, mask) if self.joins else None

    def release(self) -> None:
        """As BankEngine.release."""
        self.programs = self.trainer = None

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> CpuLanes | CudaLanes:
        """As BankEngine.side_by_side."""
        assert self.programs is not None
        compact = self.programs.compacts[run].compact(weights)
        run_of_model = torch.full((len(weights),), run, dtype=torch.int64, device=weights.device)
        runner = self.programs.lanes(compact, None, run_of_model)
        runner.set_buffers(buffers)
        for module in runner.modules:
            module.eval()
        return runner

    def describe(self) -> dict[str, Any]:
        """As BankEngine.describe."""
        why_not = self.trainer.not_captured if self.trainer is not None else "nothing was trained"
        return {
            "engine": self.kind,
            "name": self.name,
            "why": self.why,
            "operations": self.plan.count(),
            "rows": self.rows,
            "tensor_cores": self.launch is not None,
            "branch": self.branch,
            "cuda_graph": why_not is None,
            "no_cuda_graph": why_not,
        }

    def without_record(self) -> FusedEngine:
        """The same engine with no `rows` chosen yet, to be timed."""
        return FusedEngine(self.problem, self.plan, "", {}, self.launch, self.branch)

    def replay(self, record: dict[str, Any]) -> None:
        """As BankEngine.replay."""
        self.rows = record.get("rows", {})


def programs_of(
    problem: Problem, plan: Plan, mask: Tensor, rows: Rows, launch: Launch | None = None, branch: int | None = None
) -> CpuPrograms | CudaPrograms:
    """The programs of the device's kernels under a mask [Q], or on CUDA under the masks of R runs, [R, Q]."""
    if problem.device.type == "cpu":
        return CpuPrograms(problem, plan, mask, rows)
    return CudaPrograms(problem, plan, mask, launch, branch)


def faster_branch(problem: Problem, plan: Plan, launch: Launch | None) -> int | None:
    """The number of lanes per parallel group with which a group's maps fit the GPU's second-level cache.

    None if the maps of all lanes fit, if groups aren't faster by a stopwatch, or without a GPU.
    """
    if problem.device.type != "cuda":
        return None
    cache = torch.cuda.get_device_properties(problem.device).L2_cache_size
    itemsize = 2 if problem.config.precision == "bfloat16" else problem.dtype.itemsize
    branch = lanes_in_cache(plan, problem.bounds[0][1], itemsize, cache)
    if branch >= timed_lanes(problem):
        return None
    together, grouped = (
        seconds_of_steps(FusedEngine(problem, plan, "", {}, launch, lanes), problem, problem.mask)
        for lanes in (None, branch)
    )
    return branch if grouped < together else None
