"""Sweeps: runs at the points of a grid. Those that can share a step are trained together, and none is done twice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from swamp_fast import distributed
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.config import SwampConfig
from swamp_fast.distributed import Ranks
from swamp_fast.particles.schedule import total_particle_epochs
from swamp_fast.problem.arguments import Arguments, Forward, Loss, Transform
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.splits import SPLITS
from swamp_fast.runs.console import Console
from swamp_fast.runs.folder import run_id
from swamp_fast.studies.grid import Grid, Model, model_of, points_of, shared_settings
from swamp_fast.studies.packing import dealt, unfinished_packs
from swamp_fast.studies.result import SweepResult, SweptRun
from swamp_fast.studies.running import PackRunner


@one_at_a_time
def sweep(
    model: Model,
    train: object,
    test: object = None,
    grid: Grid | None = None,
    *,
    out: str | Path | None = None,
    val: object = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    transform: Transform | None = None,
    prunable: Prunable = None,
    initial_masks: Mapping[str, Tensor] | None = None,
    config: SwampConfig | None = None,
    **common: Any,
) -> SweepResult:
    """Run fast_swamp at every point of a grid of settings.

    Args:
        model: a factory, called for each run under its seed; or a module, the one initialisation of all runs.
        train, test, val, forward, loss, transform, prunable, initial_masks: as for fast_swamp.
        grid: setting -> values, of which every combination is run; or a list of points, setting -> value.
        out: a folder for the runs, each in runs/ID, and for results.csv, summary.csv and accuracy.png. A run that is
            there already is not done again; one that was stopped goes on.
        config, common: the settings that all runs share; those of the grid take precedence.

    Returns all runs. One that fails, for example because it diverges, ends with its error, and the others go on. Under
    torchrun the runs are dealt out to the ranks, each of which needs to see `out`. Raises as fast_swamp for arguments
    that don't fit, before anything is trained.
    """
    points = points_of(grid if grid is not None else [{}])
    base = shared_settings(config, common)
    arguments = Arguments(
        val=val, forward=forward, loss=loss, transform=transform, prunable=prunable, initial_masks=initial_masks
    )
    result, _ = run_points(model, train, test, arguments, points, base, out)
    if out is not None and distributed.current().first:
        draw(result.figure, Path(out) / "accuracy.png", base)
    return result


def run_points(
    model: Model,
    train: object,
    test: object,
    arguments: Arguments,
    points: Sequence[Mapping[str, Any]],
    base: SwampConfig,
    out: str | Path | None,
) -> tuple[SweepResult, list[Problem]]:
    """The runs at points that are changes of `base`, and the problem of each."""
    job = distributed.current()
    console = Console(base.progress and job.first)
    problems: list[Problem] = []
    for config in [base.replace(**point) for point in points]:
        problem = prepare(model_of(model, config.seed), train, test, arguments, config=config, settings={})
        problems.append(_with_shared_data(problem, problems))
    runs = [_run_at(point, problem, out) for point, problem in zip(points, problems, strict=True)]
    _refuse_twins(runs)
    _introduce(console, model, problems, runs)

    result = SweepResult(runs)
    write_tables = functools.partial(_write_tables, result, Path(out) if out is not None and job.first else None)
    with job.watched():
        _refuse_different_calls(job, runs, out)
        packs = job.broadcast_from_first(functools.partial(unfinished_packs, problems, runs, console))
        PackRunner(problems, runs, console, write_tables).run(dealt(packs, problems, job.world)[job.rank])
        _exchange(job, problems, runs)
    console.close()
    write_tables()
    return result, problems


def _with_shared_data(problem: Problem, others: Sequence[Problem]) -> Problem:
    """The problem with the data of another one, if they are the same, so that they are in memory once."""
    for other in others:
        same = all(problem.fingerprints[split] == other.fingerprints[split] for split in SPLITS)
        if same and (problem.device, problem.dtype) == (other.device, other.dtype):
            return dataclasses.replace(problem, train=other.train, val=other.val, test=other.test)
    return problem


def _run_at(point: Mapping[str, Any], problem: Problem, out: str | Path | None) -> SweptRun:
    config = problem.config.to_dict()
    identity = run_id({"driver": "fast_swamp", "config": config, "fingerprints": problem.fingerprints})
    shown = {name: value for name, value in point.items() if name != "layer_kept"}  # which is a table
    return SweptRun(shown, identity, None if out is None else Path(out).expanduser() / "runs" / identity)


def _refuse_twins(runs: Sequence[SweptRun]) -> None:
    points: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.id in points:
            raise ValueError(
                f"`grid` has the same run twice: {points[run.id]} and {run.point} compute the same. Remove one of them."
            )
        points[run.id] = run.point


def _introduce(console: Console, model: Model, problems: Sequence[Problem], runs: Sequence[SweptRun]) -> None:
    which = "one initialisation for all" if isinstance(model, nn.Module) else "made anew under each seed"
    epochs = sum(total_particle_epochs(problem.config) for problem in problems)
    console.line(f"sweep    {len(runs)} runs, {epochs:,} particle-epochs; the model is {which}")


def _write_tables(result: SweepResult, folder: Path | None) -> None:
    if folder is not None:
        result.write_csv(folder / "results.csv")
        result.write_csv(folder / "summary.csv", result.summary())


def _refuse_different_calls(job: Ranks, runs: Sequence[SweptRun], out: str | Path | None) -> None:
    """Refuse ranks that were called with different arguments, and several ranks without a folder."""
    if job.world > 1 and out is None:
        raise ValueError("a sweep over several ranks needs `out`, a folder that all of them see.")
    ids = [run.id for run in runs]
    differs = job.broadcast_from_first(lambda: ids) != ids
    rank = job.all_reduce_max([job.rank if differs else 0])[0]
    if rank:
        raise ValueError(
            f"every rank must be called with the same arguments, but rank {rank}'s settings, model or data differ from "
            "rank 0's."
        )


def _exchange(job: Ranks, problems: Sequence[Problem], runs: Sequence[SweptRun]) -> None:
    """Take the results and errors of the runs of other ranks."""
    errors = {number: distributed.portable(run.error) for number, run in enumerate(runs) if run.error is not None}
    parts = job.gather_to_first(errors)
    every = job.broadcast_from_first(lambda: {number: error for part in parts for number, error in part.items()})
    for number, (run, problem) in enumerate(zip(runs, problems, strict=True)):
        run.error = every.get(number)
        if not run.over and not run.load(problem):
            raise RuntimeError(f"rank {job.rank} can't read {run.folder}; `out` must be a folder that all ranks see.")


def draw(figure: Callable[[Path], Path], path: Path, base: SwampConfig) -> None:
    """Draw a figure; the console says why if it can't be drawn."""
    try:
        figure(path)
    except (ImportError, ValueError) as reason:
        Console(base.progress).line(f"figure   none: {reason}")
