"""sweep(): a run at every point of a grid. Compatible runs are trained together, and no run is repeated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from swamp_fast import distributed
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.config import SwampConfig
from swamp_fast.distributed import Ranks
from swamp_fast.particles.schedule import total_particle_epochs
from swamp_fast.problem.arguments import Arguments, Forward, Loss, Metrics, OnCycle, OnEpoch, Transform
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.recipe import Recipe
from swamp_fast.problem.splits import SPLITS
from swamp_fast.runs import lock
from swamp_fast.runs.console import Console
from swamp_fast.runs.folder import RunDirectory, run_id
from swamp_fast.studies.grid import (
    Grid,
    Model,
    Point,
    check_factory,
    folder_named,
    model_of,
    points_of,
    shared_settings,
)
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
    recipe: Recipe | None = None,
    metrics: Metrics | None = None,
    on_epoch: OnEpoch | None = None,
    on_cycle: OnCycle | None = None,
    config: SwampConfig | None = None,
    **common: Any,
) -> SweepResult:
    """Run fast_swamp at every point of a grid of settings.

    Args:
        model: a factory, which is called once per run under the run's seed; or a module, whose weights are the
            initialisation of every run.
        train, test, val, forward, loss, transform, prunable, initial_masks, recipe, metrics: as for fast_swamp.
        grid: a dict from settings to lists of values, all combinations of which are run; or a list of points, each a
            dict from settings to values. A key "model.width" is the argument `width` of the model factory. The key
            "recipe" takes recipes by name, {"recipe": {"sam": Recipe(...), "plain": None}}; names and tables show the
            name. In a list, a point has one of them.
        on_epoch, on_cycle: as for fast_swamp, called for every run. Their rows also have `run`, the run's id, and
            `point`, its point of the grid. StopRun ends the run whose row it is, and the others continue.
        out: a folder for the runs (runs/ID) and for results.csv, summary.csv and accuracy.png. Finished runs in it are
            not repeated, and interrupted runs continue. A finished run that lacks files, with a warning, computes what
            is missing again.
        config, common: the settings that all runs share; the settings of the grid take precedence.

    Returns all runs. A run that fails, for example because it diverges, ends with its error, and the others continue.
    Under torchrun the runs are distributed over the ranks, and every rank must be able to access `out`. Arguments that
    don't fit raise what fast_swamp raises, before anything is trained.
    """
    points = points_of([{}] if grid is None else grid)
    out = None if out is None else folder_named(out)
    base = shared_settings(config, common)
    shared = Arguments.of(locals())
    with folder_of_study(out):
        result, _ = run_points(model, train, test, shared, points, base, out)
        if out is not None and distributed.current().first:
            draw(result.figure, out / "accuracy.png", base)
    return result


@contextmanager
def folder_of_study(out: Path | None) -> Iterator[None]:
    """Make and lock a study's folder, if there is one. Raises ValueError if another process is writing into it."""
    if out is None or not distributed.current().first:
        yield
        return
    RunDirectory(out).make()
    with lock.locked(out):
        yield


def run_points(
    model: Model,
    train: object,
    test: object,
    arguments: Arguments,
    points: Sequence[Point],
    base: SwampConfig,
    out: Path | None,
) -> tuple[SweepResult, list[Problem]]:
    """Run a sweep whose points are changes of `base`. Returns the result, and the problem of each run.

    An exception that ends the sweep, such as KeyboardInterrupt, has the result so far as its attribute `result`.
    """
    job = distributed.current()
    console = Console(base.progress and job.first)
    problems: list[Problem] = []
    check_factory(model, points)
    for point in points:
        settings = point.settings
        if "run_dir" in settings:
            raise TypeError("`grid` can't set `run_dir`: each run of a sweep has a folder below `out`.")
        made = model_of(model, point.model_arguments, base.replace(**settings).seed)
        problem = prepare(made, train, test, point.arguments(arguments), config=base, settings=settings)
        problems.append(_with_shared_data(problem, problems))
    runs = [_run_at(point, problem, out) for point, problem in zip(points, problems, strict=True)]
    _refuse_duplicates(runs)
    _introduce(console, model, problems, runs)

    result = SweepResult(runs)
    write_tables = functools.partial(_write_tables, result, out if job.first else None)
    try:
        with job.watched():
            _refuse_different_calls(job, runs, out)
            packs = job.broadcast_from_first(functools.partial(unfinished_packs, problems, runs, console))
            PackRunner(problems, runs, console, write_tables).run(dealt(packs, problems, job.world)[job.rank])
            _exchange(job, problems, runs)
        console.close()
        write_tables()
    except BaseException as error:
        error.result = result  # type: ignore[attr-defined]
        raise
    return result, problems


def _with_shared_data(problem: Problem, others: Sequence[Problem]) -> Problem:
    """`problem`, sharing the data of an earlier problem with equal data, so that they are in memory only once."""
    for other in others:
        same = all(problem.fingerprints[split] == other.fingerprints[split] for split in SPLITS)
        if same and (problem.device, problem.dtype) == (other.device, other.dtype):
            return dataclasses.replace(problem, train=other.train, val=other.val, test=other.test)
    return problem


def _run_at(point: Point, problem: Problem, out: Path | None) -> SweptRun:
    config = problem.config.to_dict()
    identity = run_id({"driver": "fast_swamp", "config": config, "fingerprints": problem.fingerprints})
    return SweptRun(point.shown, identity, None if out is None else out / "runs" / identity)


def _refuse_duplicates(runs: Sequence[SweptRun]) -> None:
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


def _refuse_different_calls(job: Ranks, runs: Sequence[SweptRun], out: Path | None) -> None:
    """Raise ValueError if the ranks were called with different arguments, or if there are several and no folder."""
    if job.world > 1 and out is None:
        raise ValueError("a sweep on several ranks needs `out`, a folder that all ranks can access.")
    ids = [run.id for run in runs]
    differs = job.broadcast_from_first(lambda: ids) != ids
    rank = job.all_reduce_max([job.rank if differs else 0])[0]
    if rank:
        raise ValueError(
            f"every rank must be called with the same arguments, but rank {rank}'s settings, model or data differ from "
            "rank 0's."
        )


def _exchange(job: Ranks, problems: Sequence[Problem], runs: Sequence[SweptRun]) -> None:
    """Take over the results and errors of the runs that other ranks trained."""
    errors = {number: distributed.portable(run.error) for number, run in enumerate(runs) if run.error is not None}
    parts = job.gather_to_first(errors)
    every = job.broadcast_from_first(lambda: {number: error for part in parts for number, error in part.items()})
    for number, (run, problem) in enumerate(zip(runs, problems, strict=True)):
        run.error = every.get(number)
        if not run.over and not run.load(problem, stopped=True):
            raise RuntimeError(
                f"rank {job.rank} can't read {run.folder}; `out` must be a folder that all ranks can access."
            )


def draw(figure: Callable[[Path], Path], path: Path, base: SwampConfig) -> None:
    """Draw a figure. If it can't be drawn, whatever the reason, the console says why: the result must not be lost."""
    try:
        figure(path)
    except Exception as reason:
        Console(base.progress).line(f"figure   none: {reason}")
