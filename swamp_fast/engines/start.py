"""The engines: eager (any model, any device), fused (a traced model on this project's kernels), by density (both).

Each trains a bank of particles, and runs models side by side. `rule` has their names, and chooses among them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from swamp_fast.engines.eager.engine import EagerEngine, fastest_choice, why_not
from swamp_fast.engines.fused.check import differs_from_autograd, tensor_cores
from swamp_fast.engines.fused.cpu.program import Rows
from swamp_fast.engines.fused.engine import FusedEngine, faster_branch, fused_plan, seconds_of_steps
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.selection import Choice, Selection, by_rule, flop_density, named
from swamp_fast.engines.switching import SwitchingEngine
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.record import Run

Engine = EagerEngine | FusedEngine | SwitchingEngine


def start_engine(problem: Problem, run: Run) -> Engine:
    """The engine that the settings name or the rule selects; the run records it, and one that goes on replays it.

    Raises ValueError for an engine that can't run the model.
    """
    run.console.status("choosing the engine")
    wanted = str(run.engine.get("name")) if run.engine else problem.config.engine
    plan = "it was not requested" if wanted.startswith("eager") else _proven_plan(problem)  # by all ranks at a time
    mine: list[Engine] = []

    def selected() -> dict[str, Any]:
        mine.append(_started(problem, _selection(problem, plan), plan, run))
        return mine[0].describe()

    if not run.engine:
        run.share_engine(selected)
    engine = mine[0] if mine else _recorded(problem, plan, run)
    threads = f", {torch.get_num_threads()} threads" if problem.device.type == "cpu" else ""
    run.console.line(f"engine   {engine.name} on {problem.device}{threads}, {problem.config.precision}; {engine.why}")
    return engine


def _selection(problem: Problem, plan: Plan | str) -> Selection:
    """The engines that the settings ask for."""
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
        reason = why_not(problem, selection.eager, _most_particles(problem))
        if reason is not None:
            raise ValueError(f'engine="{wanted}" can\'t run the model: {reason}. Use "auto" or "eager".')
    return selection


def _fastest(problem: Problem, plan: Plan | str) -> Selection:
    """What a stopwatch finds fastest here and now: under the first mask, and one as sparse as the last."""
    choice = fastest_choice(problem, _most_particles(problem))
    if isinstance(plan, str):
        return Selection(0.0, choice, choice.why)
    eager_seconds = seconds_of_steps(EagerEngine(problem, choice), problem, problem.mask)
    fused = _fused(problem, plan, "", {})
    masks = _first_and_last(problem)
    first, last = (seconds_of_steps(fused.anew(), problem, mask) for mask in masks)
    figures = (
        f"the fastest measured: a step takes the fused engine {first * 1e3:.1f} ms at first and {last * 1e3:.1f} at "
        f"last, the eager one {eager_seconds * 1e3:.1f}"
    )
    if first < eager_seconds:
        return Selection(1.0, None, figures)
    if last >= eager_seconds:
        return Selection(0.0, choice, figures)
    densities = [flop_density(problem, mask) for mask in masks]
    share = (eager_seconds - last) / (first - last)  # between the two, time is about linear in the FLOP density
    crossover = round(densities[1] + share * (densities[0] - densities[1]), 3)
    return Selection(min(max(crossover, 0.001), 0.999), choice, figures)


def _started(
    problem: Problem, selection: Selection, plan: Plan | str, run: Run, there: dict[str, Any] | None = None
) -> Engine:
    """The engines of a selection; `there` is what a run recorded of them, from which it goes on."""
    fused = eager = None
    if isinstance(plan, Plan) and selection.fused_up_to > 0:
        own = None if there is None else there.get("fused", there)
        fused = _new_fused(problem, plan, selection.why) if own is None else _recorded_fused(problem, plan, own)
    if selection.eager is not None and there is not None:
        eager = _recorded_eager(problem, selection.eager, there.get("eager", there))
    elif selection.eager is not None:
        covered = isinstance(plan, Plan) or problem.config.engine.startswith("eager")
        eager = EagerEngine(problem, selection.eager, None if covered else str(plan))
    if fused is None or eager is None:
        alone = eager or fused
        assert alone is not None
        return alone
    both = SwitchingEngine(fused, eager, selection, run.console.line)
    if there is not None:
        both.replay(there)
    return both


def _recorded(problem: Problem, plan: Plan | str, run: Run) -> Engine:
    """The engine of a run that goes on."""
    there = run.engine
    selection = recorded_selection(there)
    if selection is None:
        raise ValueError(
            f"the run's run.json tells no engine that this version knows (name = {there.get('name')!r}): an earlier "
            "version wrote it, or it is damaged. Name another run_dir to start afresh."
        )
    if selection.fused_up_to > 0 and isinstance(plan, str):
        raise ValueError(f"the run was begun by the fused engine, which can't run the model here: {plan}.")
    return _started(problem, selection, plan, run, there)


def recorded_selection(there: dict[str, Any]) -> Selection | None:
    """What a run's record of its engine selects; None for a record that is damaged or of another version."""
    selection = named(there.get("name"), str(there.get("why", "")))
    if selection is None:
        return None
    parts: list[Any] = [there]
    if selection.eager is not None and selection.fused_up_to > 0:
        parts += [there.get("fused"), there.get("eager"), there.get("engines")]
    if not all(isinstance(part, dict) for part in parts):
        return None
    rows = [part.get("rows", {}) for part in parts]
    whole = all(isinstance(each, dict) and all(isinstance(own, dict) for own in each.values()) for each in rows)
    return selection if whole else None


def _new_fused(problem: Problem, plan: Plan, why: str) -> FusedEngine:
    fused = _fused(problem, plan, why, {})
    fused.branch = faster_branch(problem, plan, fused.launch)
    return fused


def _recorded_fused(problem: Problem, plan: Plan, there: dict[str, Any]) -> FusedEngine:
    fused = _fused(problem, plan, there.get("why", ""), there.get("rows", {}), there.get("tensor_cores", True))
    fused.branch = there.get("branch")
    return fused


def _recorded_eager(problem: Problem, choice: Choice, there: dict[str, Any]) -> EagerEngine:
    told = {name: there[name] for name in ("why", "milliseconds") if name in there}
    return EagerEngine(problem, dataclasses.replace(choice, **told), there.get("why_not_fused"))


def _fused(
    problem: Problem, plan: Plan, why: str, rows: dict[str, Rows], with_tensor_cores: bool = True
) -> FusedEngine:
    """The fused engine, on a GPU with the kernels of csrc/cuda where they can be compiled."""
    launch = tensor_cores(problem, plan) if with_tensor_cores else "the run was begun without"
    if isinstance(launch, str):
        if problem.device.type == "cuda" and "by Triton alone" not in why:
            why = f"{why}; by Triton alone, without the CUDA kernels: {launch}"
        return FusedEngine(problem, plan, why, rows)
    return FusedEngine(problem, plan, why, rows, launch)


def _proven_plan(problem: Problem) -> Plan | str:
    """The plan of the fused engine, checked against autograd; or why there is none."""
    plan = fused_plan(problem)
    if isinstance(plan, Plan):
        return differs_from_autograd(problem, plan) or plan
    return plan


def _most_particles(problem: Problem) -> int:
    return max(problem.config.particles_at(cycle) for cycle in range(problem.config.cycles + 1))


def _first_and_last(problem: Problem) -> list[Tensor]:
    """The first mask, and one with as many weights as the last, at random."""
    share = (1 - problem.config.prune) ** problem.config.cycles
    drawn = torch.rand(problem.mask.shape, generator=torch.Generator().manual_seed(0))
    return [problem.mask, problem.mask & (drawn < share).to(problem.mask.device)]
