"""The fused engine: which plan, which device's kernels, and the bank under each cycle's mask."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.engines.fused.compact import CompactBank
from swamp_fast.engines.fused.cpu.program import Rows
from swamp_fast.engines.fused.cpu.runner import CpuLanes, CpuPrograms
from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.cuda.runner import CudaLanes, CudaPrograms, lanes_in_cache
from swamp_fast.engines.fused.plan import Convolution, Plan
from swamp_fast.engines.fused.trace import NotCovered, plan_of
from swamp_fast.engines.trainer import BankEngine, Trainer, first_handle
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.particles.norms import norms_of
from swamp_fast.particles.random import generators_left_alone
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.solutions import initial

STEPS = 3  # that are timed
TIMED_LANES = 8  # on CUDA, where lanes side by side are the point


class FusedEngine(BankEngine):
    """Trains a bank of particles and runs models side by side for evaluation, by this project's own kernels.

    rows    of each cycle ("ticket" for the ticket's): how its convolutions share loads, by a stopwatch; part of a run's
            state, so that resuming replays it
    launch  of the kernels of csrc/cuda; None where Triton's run alone
    branch  how many lanes of a GPU run as one of several groups beside each other, if that measured faster; else None
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
        self.joins = problem.device.type == "cuda"  # a program of the CPU's kernels is made for one mask

    def spawn_runs(
        self,
        starts: Sequence[Solution],
        masks: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        configs: Sequence[SwampConfig],
    ) -> ParticleBank:
        """As BankEngine.spawn_runs; the bank and its program are made for the masks, on the CPU for one."""
        self.release()  # before new memory is taken
        rows = self.rows.setdefault("ticket" if cycle is None else str(cycle), {})
        mask = masks if len(masks) > 1 else masks[0]
        self.programs = programs_of(self.problem, self.plan, mask, rows, self.launch, self.branch)
        bank = CompactBank(self.programs.compacts, configs, len(starts) * len(particles), self.problem.dtype)
        bank.rewind_(starts, masks, particles, cycle)
        grads = torch.zeros_like(bank.weights)
        self.programs.measure(bank.lanes)
        way = self.programs.lanes(bank.weights, grads, bank.run_of_lane)
        self.trainer = Trainer(self.problem, bank, grads, way)
        return bank

    def release(self) -> None:
        """Give the memory of training and evaluation back."""
        self.programs = self.trainer = None

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor], run: int = 0) -> CpuLanes | CudaLanes:
        """As EagerEngine.side_by_side."""
        assert self.programs is not None
        compact = self.programs.compacts[run].compact(weights)
        of_run = torch.full((len(weights),), run, dtype=torch.int64, device=weights.device)
        way = self.programs.lanes(compact, None, of_run)
        way.set_buffers(buffers)
        for module in way.modules:
            module.eval()
        return way

    def describe(self) -> dict[str, Any]:
        """What ran, how, and why."""
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

    def anew(self) -> FusedEngine:
        """The same with nothing recorded yet, to be timed."""
        return FusedEngine(self.problem, self.plan, "", {}, self.launch, self.branch)

    def replay(self, there: dict[str, Any]) -> None:
        """Take over what another's stopwatch decided, as its `describe` has it."""
        self.rows = there.get("rows", {})


def faster_branch(problem: Problem, plan: Plan, launch: Launch | None) -> int | None:
    """How many lanes to run as one of several groups, so that a group's maps stay in the second-level cache of a GPU.

    None where all fit it, where it isn't faster by a stopwatch, or without a GPU.
    """
    if problem.device.type != "cuda":
        return None
    cache = torch.cuda.get_device_properties(problem.device).L2_cache_size
    itemsize = 2 if problem.config.precision == "bfloat16" else problem.dtype.itemsize
    branch = lanes_in_cache(plan, problem.bounds[0][1], itemsize, cache)
    if branch >= timed_lanes(problem):
        return None
    together, grouped = (
        seconds_of_steps(FusedEngine(problem, plan, "", {}, launch, each), problem, problem.mask)
        for each in (None, branch)
    )
    return branch if grouped < together else None


def timed_lanes(problem: Problem) -> int:
    """How many lanes a step is timed with."""
    most = max(problem.config.particles_at(cycle) for cycle in range(problem.config.cycles + 1))
    return min(most, TIMED_LANES) if problem.device.type == "cuda" else 1


def seconds_of_steps(engine: Any, problem: Problem, mask: Tensor, lanes: int | None = None) -> float:
    """The least time of a particle's step under a mask, after one to warm up, of so many lanes or of timed_lanes."""
    lanes = lanes or timed_lanes(problem)
    bank = engine.spawn(initial(problem), mask, range(lanes), None)
    trainer = engine.trainer
    trainer.way.set_buffers(bank.buffers)
    for module in trainer.way.modules:
        module.train()
    handle = first_handle(problem, bank)
    times = []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        trainer.step(handle)
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        times.append(time.perf_counter() - began)
    return min(times[1:]) / lanes


def programs_of(
    problem: Problem, plan: Plan, mask: Tensor, rows: Rows, launch: Launch | None = None, branch: int | None = None
) -> CpuPrograms | CudaPrograms:
    """What the device's kernels need under one mask [Q]."""
    if problem.device.type == "cpu":
        return CpuPrograms(problem, plan, mask, rows)
    return CudaPrograms(problem, plan, mask, launch, branch)


def fused_plan(problem: Problem) -> Plan | str:
    """The plan by which the fused engine can run the model, or why it can't."""
    if problem.device.type not in ("cpu", "cuda"):
        return f"it has no kernels for {problem.device.type}"
    if torch.version.hip is not None:
        return "its kernels were not yet tried on a GPU of AMD's"  # blocks' arrivals need a fence of every wave there
    if not problem.train.stacked:
        return "the batches come from a collate function of the user's"
    probe = problem.probe
    if probe.draws_elsewhere:
        return "its forward draws random numbers that are not dropout's"
    if probe.keeps_state:
        return "its forward keeps state of its own"
    if probe.changed:
        return f"its forward changes {probe.changed[0]}"
    if probe.reads_values is not None:
        return f"its forward looks at values ({probe.reads_values})"
    keys = torch.zeros(1, 3, dtype=torch.int64, device=problem.device)
    order = torch.arange(problem.train.length, device=problem.device)[None]
    handle = next(iter(problem.train.batches(order, keys, [problem.bounds[0]])))
    inputs, _ = problem.train.fetch(handle, None).lane(0)
    if problem.transform is not None and isinstance(inputs, Tensor):
        with generators_left_alone():
            if problem.transform(inputs.clone()).shape != inputs.shape:
                return "the transform changes the shape of its inputs"
    try:
        plan = plan_of(problem.template, problem.forward, inputs)
    except NotCovered as reason:
        return str(reason)
    weights = {op.weight for op in plan.ops if isinstance(op, Convolution)}
    for entry in problem.layout.prunable:
        if entry.name not in weights:
            return f"{entry.name} is pruned and is no weight of a convolution or a linear layer"
    frozen = [name for name, p in problem.template.named_parameters() if not p.requires_grad]
    if frozen:
        return f"{frozen[0]} is frozen"
    template = copy.deepcopy(problem.template).train()
    norms = norms_of([template])
    for path, module in template.named_modules():
        if module in norms and not module.training:
            return f"{path} ({type(module).__name__}) doesn't train"
        if module in norms and module.momentum != norms[0].momentum:
            return f"{path} ({type(module).__name__}) has another momentum than the first norm"
    if len(norms) != len(plan.norms):
        return "it has norms that its forward doesn't use"
    return plan
