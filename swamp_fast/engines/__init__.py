"""The engines: eager (any model, any device), fused (a traced model on this project's kernels), by density (both).

Each trains a bank of particles, and runs models side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swamp_fast.engines.by_density import EngineByDensity
from swamp_fast.engines.eager import NAMES, Choice, EagerEngine, choose
from swamp_fast.engines.fused.check import differs_from_autograd, tensor_cores
from swamp_fast.engines.fused.cpu.program import Rows
from swamp_fast.engines.fused.engine import FusedEngine, faster_branch, fused_plan, seconds_of_steps
from swamp_fast.plan import Plan
from swamp_fast.problem import Problem
from swamp_fast.run import Run

Engine = EagerEngine | FusedEngine | EngineByDensity


def start_engine(problem: Problem, run: Run) -> Engine:
    """The engine that the settings ask for; what a stopwatch chose is recorded in the run, and replayed from it.

    Raises ValueError for an engine that can't be had.
    """
    run.console.status("trying how the particles run fastest")
    wanted = run.engine.get("engine", problem.config.engine)
    plan = "eager was asked for" if wanted == "eager" else _proven_plan(problem)  # by all ranks at the same time
    mine: list[Engine] = []

    def chosen() -> dict[str, Any]:
        mine.append(_chosen(problem, run, plan))
        return mine[0].describe()

    if not run.engine:
        run.keep_engine(run.ranks.decided(chosen))
    engine = mine[0] if mine else _recorded(problem, run, plan)
    threads = f", {torch.get_num_threads()} threads" if problem.device.type == "cpu" else ""
    run.console.line(f"engine   {engine.name} on {problem.device}{threads}, {problem.config.precision}; {engine.why}")
    return engine


def _chosen(problem: Problem, run: Run, plan: Plan | str) -> Engine:
    """The fastest that can run the model, or the one that is asked for."""
    wanted = problem.config.engine
    if wanted == "fused":
        if isinstance(plan, str):
            raise ValueError(f'engine="fused" can\'t be had: {plan}. Use "auto" or "eager".')
        fused = _fused(problem, plan, "asked for", {})
        fused.branch = faster_branch(problem, plan, fused.launch)
        return fused
    most = max(problem.config.particles_at(cycle) for cycle in range(problem.config.cycles + 1))
    choice = choose(problem, most)
    if isinstance(plan, str):
        return EagerEngine(problem, choice, None if wanted == "eager" else plan)
    eager = EagerEngine(problem, choice, None)
    eager_seconds = seconds_of_steps(eager, problem, problem.mask)
    fused = _fused(problem, plan, "", {})
    fused.branch = faster_branch(problem, plan, fused.launch)
    first, last = (seconds_of_steps(fused.anew(), problem, mask) for mask in _first_and_last(problem))
    figures = (
        f"a step takes {first * 1e3:.1f} ms at first and {last * 1e3:.1f} at last, against {eager_seconds * 1e3:.1f}"
    )
    if first < eager_seconds:
        fused.why = f"the fastest measured: {figures} of the eager engine{fused.why}"
        return fused
    if last < eager_seconds:
        why = f"the fused engine from the density on where it is faster: {figures} of the eager engine"
        return EngineByDensity(fused, eager, eager_seconds, {}, why, run.console.line)
    return EagerEngine(problem, choice, f"it was slower: {figures}")


def _recorded(problem: Problem, run: Run, plan: Plan | str) -> Engine:
    """The engine of a run that goes on."""
    there = run.engine
    if there.get("engine") == EngineByDensity.name:
        _must_have(there, "fused", "eager", "eager_seconds", "engines", "why")
        fused, eager = _recorded_fused(problem, plan, there["fused"]), _recorded_eager(problem, there["eager"])
        figures = there["eager_seconds"], there["engines"], there["why"]
        return EngineByDensity(fused, eager, *figures, run.console.line)
    if there.get("engine") == FusedEngine.name:
        return _recorded_fused(problem, plan, there)
    return _recorded_eager(problem, there)


def _recorded_fused(problem: Problem, plan: Plan | str, there: dict[str, Any]) -> FusedEngine:
    if isinstance(plan, str):
        raise ValueError(f"the run was begun by the fused engine, which can't be had here: {plan}.")
    fused = _fused(problem, plan, there.get("why", ""), there.get("rows", {}), there.get("tensor_cores", True))
    fused.branch = there.get("branch")
    return fused


def _fused(
    problem: Problem, plan: Plan, why: str, rows: dict[str, Rows], with_tensor_cores: bool = True
) -> FusedEngine:
    """The fused engine, on a GPU with the kernels of csrc/cuda where they can be had."""
    launch = tensor_cores(problem, plan) if with_tensor_cores else "the run was begun without"
    if isinstance(launch, str):
        if problem.device.type == "cuda":
            why = f"{why}; by Triton alone, without the CUDA kernels: {launch}"
        return FusedEngine(problem, plan, why, rows)
    return FusedEngine(problem, plan, why, rows, launch)


def _recorded_eager(problem: Problem, there: dict[str, Any]) -> EagerEngine:
    _must_have(there, *Choice.__dataclass_fields__)
    if there["way"] not in NAMES:
        raise ValueError(
            f'the run\'s run.json is damaged: its engine has the way "{there["way"]}". Name another run_dir.'
        )
    choice = Choice(**{name: there[name] for name in Choice.__dataclass_fields__})
    return EagerEngine(problem, choice, there.get("why_not_fused"))


def _must_have(there: dict[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(
            f"the run's run.json is damaged: its engine lacks {', '.join(missing)}. Name another run_dir to start "
            "afresh."
        )


def _proven_plan(problem: Problem) -> Plan | str:
    """The plan of the fused engine, checked against autograd; or why there is none."""
    plan = fused_plan(problem)
    if isinstance(plan, Plan):
        return differs_from_autograd(problem, plan) or plan
    return plan


def _first_and_last(problem: Problem) -> list[Tensor]:
    """The first mask, and one with as many weights as the last, at random."""
    share = (1 - problem.config.prune) ** problem.config.cycles
    drawn = torch.rand(problem.mask.shape, generator=torch.Generator().manual_seed(0))
    return [problem.mask, problem.mask & (drawn < share).to(problem.mask.device)]
