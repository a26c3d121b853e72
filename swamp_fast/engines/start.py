"""Starts a run's engine: the one that the settings select, or the recorded one if the run is resumed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.eager.fastest import fastest_choice, why_not
from swamp_fast.engines.fused.check import differs_from_autograd, tensor_cores
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.cpu.workspace import Rows
from swamp_fast.engines.fused.engine import FusedEngine, faster_branch
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.selection import Selection, by_rule, flop_density, named
from swamp_fast.engines.step_time import most_particles, seconds_of_steps
from swamp_fast.engines.switching import SwitchingEngine
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.record import Run

Engine = EagerEngine | FusedEngine | SwitchingEngine

NO_CUDA_KERNELS = "by Triton kernels only, without the CUDA kernels"  # part of the engine's `why` in a run's record


def start_engine(problem: Problem, run: Run) -> Engine:
    """Start the engine of a run, and record it. A resumed run gets its recorded engine.

    Raises ValueError if that engine can't run the model.
    """
    run.console.status("choosing the engine")
    wanted = str(run.engine.get("name")) if run.engine else problem.config.engine
    plan = "it was not requested" if wanted.startswith("eager") else proven_plan(problem)  # all ranks do this together
    started: list[Engine] = []  # filled only on the rank that selects the engine

    def select() -> dict[str, Any]:
        started.append(_started(problem, _selection(problem, plan), plan, run))
        return started[0].describe()

    if not run.engine:
        run.share_engine(select)
    engine = started[0] if started else _recorded(problem, plan, run)
    threads = f", {torch.get_num_threads()} threads" if problem.device.type == "cpu" else ""
    run.console.line(f"engine   {engine.name} on {problem.device}{threads}, {problem.config.precision}; {engine.why}")
    return engine


def proven_plan(problem: Problem) -> Plan | str:
    """The fused engine's plan if its results agree with autograd; otherwise the reason why it can't run the model."""
    plan = fused_plan(problem)
    if isinstance(plan, Plan):
        return differs_from_autograd(problem, plan) or plan
    return plan


def _selection(problem: Problem, plan: Plan | str) -> Selection:
    """The selection that the settings ask for. Raises ValueError if they name an engine that can't run the model."""
    wanted = problem.config.engine
    if wanted in ("auto", "eager"):
        return by_rule(problem, plan)
    if wanted == "fastest":
        return _fastest(problem, plan)
    selection = named(wanted, "requested")
    assert selection is not None  # the settings were checked
    if selection.fused_up_to > 0 and isinstance(plan, str):
        raise ValueError(f'engine="{wanted}" can\'t run the model: {plan}. Use "auto" or "eager".')
    if selection.eager is not None:
        reason = why_not(problem, selection.eager, most_particles(problem))
        if reason is not None:
            raise ValueError(f'engine="{wanted}" can\'t run the model: {reason}. Use "auto" or "eager".')
    return selection


def _fastest(problem: Problem, plan: Plan | str) -> Selection:
    """The selection for engine="fastest", from measured times under the first mask and one as sparse as the last."""
    choice = fastest_choice(problem, most_particles(problem))
    if isinstance(plan, str):
        return Selection(0.0, choice, choice.why)
    eager_seconds = seconds_of_steps(EagerEngine(problem, choice), problem, problem.mask)
    fused = _fused(problem, plan, "", {})
    masks = _first_and_last(problem)
    first, last = (seconds_of_steps(fused.without_record(), problem, mask) for mask in masks)
    why = (
        f"the fastest measured: a step takes {first * 1e3:.1f} ms on the fused engine under the first mask and "
        f"{last * 1e3:.1f} ms under the last, {eager_seconds * 1e3:.1f} ms on the eager engine"
    )
    if first < eager_seconds:
        return Selection(1.0, None, why)
    if last >= eager_seconds:
        return Selection(0.0, choice, why)
    densities = [flop_density(problem, mask) for mask in masks]
    # Between the two masks, the fused engine's time is about linear in the FLOP density.
    position = (eager_seconds - last) / (
        first - last
    )  # where both are equally fast: 0 at the last mask, 1 at the first
    crossover = round(densities[1] + position * (densities[0] - densities[1]), 3)
    return Selection(min(max(crossover, 0.001), 0.999), choice, why)


def _first_and_last(problem: Problem) -> list[Tensor]:
    """The first mask [Q] of the run, and a random mask [Q] with about the density of the last one."""
    density = (1 - problem.config.prune) ** problem.config.cycles
    drawn = torch.rand(problem.mask.shape, generator=torch.Generator().manual_seed(0))
    return [problem.mask, problem.mask & (drawn < density).to(problem.mask.device)]


def _started(
    problem: Problem, selection: Selection, plan: Plan | str, run: Run, record: dict[str, Any] | None = None
) -> Engine:
    """Start the engine of a selection. With a `record`, from a resumed run, the engine adopts the recorded choices."""
    fused = eager = None
    if isinstance(plan, Plan) and selection.fused_up_to > 0:
        if record is None:
            fused = _new_fused(problem, plan, selection.why)
        else:
            fused = _recorded_fused(problem, plan, record.get("fused", record))
    if selection.eager is not None and record is not None:
        eager = _recorded_eager(problem, selection.eager, record.get("eager", record))
    elif selection.eager is not None:
        covered = isinstance(plan, Plan) or problem.config.engine.startswith("eager")
        eager = EagerEngine(problem, selection.eager, None if covered else str(plan))
    if fused is None or eager is None:
        only = eager or fused
        assert only is not None
        return only
    switching = SwitchingEngine(fused, eager, selection, run.console.line)
    if record is not None:
        switching.replay(record)
    return switching


def _recorded(problem: Problem, plan: Plan | str, run: Run) -> Engine:
    """Start the engine of a resumed run. Raises ValueError if its record is damaged or the engine can't run here."""
    record = run.engine
    selection = recorded_selection(record)
    if selection is None:
        raise ValueError(
            f"the run's run.json names no engine that this version knows (name = {record.get('name')!r}): an earlier "
            "version wrote it, or it is damaged. Choose another run_dir to start a new run."
        )
    if selection.fused_up_to > 0 and isinstance(plan, str):
        raise ValueError(f"the run began on the fused engine, which can't run the model on this machine: {plan}.")
    return _started(problem, selection, plan, run, record)


def recorded_selection(record: dict[str, Any]) -> Selection | None:
    """The selection in a run's record of its engine; None if the record is damaged or from an incompatible version."""
    selection = named(record.get("name"), str(record.get("why", "")))
    if selection is None:
        return None
    parts: list[Any] = [record]
    if selection.eager is not None and selection.fused_up_to > 0:
        parts += [record.get("fused"), record.get("eager"), record.get("engines")]
    if not all(isinstance(part, dict) for part in parts):
        return None
    rows_by_cycle = [part.get("rows", {}) for part in parts]
    intact = all(
        isinstance(rows, dict) and all(isinstance(rows_of_cycle, dict) for rows_of_cycle in rows.values())
        for rows in rows_by_cycle
    )
    return selection if intact else None


def _new_fused(problem: Problem, plan: Plan, why: str) -> FusedEngine:
    fused = _fused(problem, plan, why, {})
    fused.branch = faster_branch(problem, plan, fused.launch)
    return fused


def _recorded_fused(problem: Problem, plan: Plan, record: dict[str, Any]) -> FusedEngine:
    fused = _fused(problem, plan, record.get("why", ""), record.get("rows", {}), record.get("tensor_cores", True))
    fused.branch = record.get("branch")
    return fused


def _recorded_eager(problem: Problem, choice: Choice, record: dict[str, Any]) -> EagerEngine:
    recorded = {name: record[name] for name in ("why", "milliseconds") if name in record}
    return EagerEngine(problem, dataclasses.replace(choice, **recorded), record.get("why_not_fused"))


def _fused(
    problem: Problem, plan: Plan, why: str, rows: dict[str, Rows], with_tensor_cores: bool = True
) -> FusedEngine:
    """A fused engine. On a GPU, it uses the kernels of csrc/cuda if they compile and pass their check."""
    launch = tensor_cores(problem, plan) if with_tensor_cores else "the run began without them"
    if isinstance(launch, str):
        if problem.device.type == "cuda" and NO_CUDA_KERNELS not in why:
            why = f"{why}; {NO_CUDA_KERNELS}: {launch}"
        return FusedEngine(problem, plan, why, rows)
    return FusedEngine(problem, plan, why, rows, launch)
