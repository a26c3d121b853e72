"""FusedEngine: runs a Plan on this project's own kernels, with a new bank and new programs for each cycle's mask."""

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
    """Trains lanes by running a plan on this project's own kernels.

    rows    for each cycle (key "ticket" for training the ticket): how many output channels of each convolution share
            their loads. Chosen by timing and recorded in the run, so that a resumed run uses the same numbers
    launch  launches the CUDA kernels in csrc/cuda; None if only the Triton kernels run
    branch  on a GPU, the number of lanes per group if parallel groups were measured to be faster; otherwise None
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
        self.joins = problem.device.type == "cuda"  # a CPU program is made for a single mask

    def spawn_runs(
        self,
        starts: Sequence[Solution],
        masks: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        configs: Sequence[SwampConfig],
    ) -> ParticleBank:
        """See BankEngine.spawn_runs. The bank and its programs are made for these masks; a CPU allows one mask only."""
        self.release()  # free the last cycle's memory before allocating more
        rows = self.rows.setdefault("ticket" if cycle is None else str(cycle), {})
        mask = masks if len(masks) > 1 else masks[0]
        self.programs = programs_of(self.problem, self.plan, mask, rows, self.launch, self.branch)
        lanes, own_optimizer = len(starts) * len(particles), self.problem.own_optimizer is not None
        bank = CompactBank(self.programs.compacts, configs, lanes, self.problem.dtype, own_optimizer)
        bank.rewind_(starts, masks, particles, cycle)
        grads = torch.zeros_like(bank.weights)
        self.programs.measure(bank.lanes)
        runner = self.programs.lanes(bank.weights, grads, bank.run_of_lane)
        self.trainer = Trainer(self.problem, bank, grads, runner)
        return bank

    def bank_key(self, mask: Tensor) -> object:
        """See BankEngine.bank_key. Runs share a program if their masks leave the same channels alive."""
        return channels_left(self.plan, self.problem.layout, mask) if self.joins else None

    def release(self) -> None:
        """See BankEngine.release."""
        self.programs = self.trainer = None

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> CpuLanes | CudaLanes:
        """See BankEngine.side_by_side."""
        assert self.programs is not None
        compact = self.programs.compacts[run].compact(weights)
        run_of_model = torch.full((len(weights),), run, dtype=torch.int64, device=weights.device)
        runner = self.programs.lanes(compact, None, run_of_model)
        runner.set_buffers(buffers)
        for module in runner.modules:
            module.eval()
        return runner

    def describe(self) -> dict[str, Any]:
        """See BankEngine.describe."""
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
        """A copy of this engine with no `rows` chosen yet, for timing."""
        return FusedEngine(self.problem, self.plan, "", {}, self.launch, self.branch)

    def replay(self, record: dict[str, Any]) -> None:
        """See BankEngine.replay."""
        self.rows = record.get("rows", {})


def programs_of(
    problem: Problem, plan: Plan, mask: Tensor, rows: Rows, launch: Launch | None = None, branch: int | None = None
) -> CpuPrograms | CudaPrograms:
    """The programs for a mask [Q]; on CUDA also for the masks [R, Q] of R runs."""
    if problem.device.type == "cpu":
        return CpuPrograms(problem, plan, mask, rows)
    return CudaPrograms(problem, plan, mask, launch, branch)


def faster_branch(problem: Problem, plan: Plan, launch: Launch | None) -> int | None:
    """Return the number of lanes per group if training groups of lanes in parallel is faster, otherwise None.

    Each group has as many lanes as possible whose feature maps still fit in the GPU's L2 cache. Returns None without
    timing if there is no GPU or if the feature maps of all lanes fit the cache.
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
