"""Sweeps: many runs over a grid of settings, those that can share a step packed into one bank, none computed twice."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast import distributed
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.common.format import duration, percent
from swamp_fast.common.statistics import mean_and_spread
from swamp_fast.common.tables import csv_bytes
from swamp_fast.config import SwampConfig
from swamp_fast.distributed import Ranks
from swamp_fast.driver import swamp
from swamp_fast.engines.start import Engine, recorded_selection, start_engine
from swamp_fast.particles.schedule import total_particle_epochs
from swamp_fast.problem.arguments import Arguments, Forward, Loss, Transform
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.splits import SPLITS
from swamp_fast.report.figures import accuracy_of_points
from swamp_fast.runs.checkpoint import RunDirectory, run_id, write
from swamp_fast.runs.console import Console
from swamp_fast.runs.progress import FIRST_ESTIMATE_SECONDS
from swamp_fast.runs.record import Run
from swamp_fast.runs.result import SwampResult
from swamp_fast.runs.resume import place_of
from swamp_fast.runs.signals import StopSignals
from swamp_fast.studies.packing import Pack, dealt, packed, packs_of, runs_at_once

Model = nn.Module | Callable[[], nn.Module]
Grid = Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]]

SCORES = ("accuracy", "loss", "mean_accuracy", "best_accuracy", "ensemble_accuracy", "val_accuracy")  # of a row


@dataclass
class SweptRun:
    """One run of a sweep: its point of the grid, and its result or the error that it ended with.

    id      the hash of its settings, model and data
    folder  its run directory, if the sweep has one
    """

    point: dict[str, Any]
    id: str
    folder: Path | None
    result: SwampResult | None = None
    error: Exception | None = None


@dataclass
class SweepResult:
    """All runs of a sweep, in the order of the grid."""

    runs: list[SweptRun]

    @property
    def names(self) -> list[str]:
        """The settings that the points set, but for the seed."""
        return list(dict.fromkeys(name for run in self.runs for name in run.point if name != "seed"))

    def rows(self) -> list[dict[str, Any]]:
        """A row a run and cycle: id, the run's point, the history's other numbers; a run that failed has its error."""
        rows = []
        for run in self.runs:
            history = [{}] if run.result is None else run.result.history
            for row in history:
                plain = {name: value for name, value in row.items() if isinstance(value, int | float | None)}
                plain |= {"dropped": len(row["dropped"])} if row else {}
                error = "" if run.error is None else f"{type(run.error).__name__}: {run.error}"
                rows.append({"id": run.id, **run.point, **plain, **run.point, "error": error})
        return rows

    def summary(self) -> list[dict[str, Any]]:
        """A row a point without its seed and cycle: how many seeds, each score's mean and standard deviation.

        The latter is None of one seed, both NaN where a score isn't finite.
        """
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        points: dict[tuple[Any, ...], dict[str, Any]] = {}
        for run in self.runs:
            if run.result is None:
                continue
            point = {name: value for name, value in run.point.items() if name != "seed"}
            for row in run.result.history:
                key = (*(f"{name} = {value}" for name, value in point.items()), row["cycle"])
                points[key] = point
                groups.setdefault(key, []).append(row)
        return [
            {**points[key], "cycle": rows[0]["cycle"], "density": rows[0]["density"], "seeds": len(rows)}
            | {name: value for score in SCORES for name, value in spread_of(score, rows).items()}
            for key, rows in groups.items()
        ]

    def write_csv(self, path: str | Path, rows: list[dict[str, Any]] | None = None) -> Path:
        """Write `rows()`, or other rows, as CSV; the settings of all points come first, before `cycle`."""
        rows = self.rows() if rows is None else rows
        columns = {name for row in rows for name in row}
        first = ["id", *(name for run in self.runs for name in run.point)]
        return write_csv(Path(path), rows, [name for name in first if name in columns])

    def figure(self, path: str | Path) -> Path:
        """Draw the accuracy over the density, a line a point without its seed, with its spread over seeds.

        Raises ImportError without matplotlib, ValueError without accuracies.
        """
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in self.summary():
            label = ", ".join(f"{name} = {row[name]}" for name in self.names if name in row) or "all"
            lines.setdefault(label, []).append(row)
        return accuracy_of_points(lines, Path(path))


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
            there already is not computed again; one that was stopped goes on.
        config, common: what all runs share; the grid's settings take precedence.

    Returns all runs. One that fails, as by divergence, ends with its error, and the others go on. Under torchrun the
    runs are dealt out to the ranks, each of which needs to see `out`. Raises as fast_swamp does for arguments that
    don't fit, before anything is trained.
    """
    points = points_of(grid if grid is not None else [{}])
    base = without_folder(SwampConfig.of(config, common))
    arguments = Arguments(
        val=val, forward=forward, loss=loss, transform=transform, prunable=prunable, initial_masks=initial_masks
    )
    found, _ = swept(model, train, test, points, base, out, arguments)
    if out is not None and distributed.current().first:
        drawn(found.figure, Path(out) / "accuracy.png", base)
    return found


def swept(
    model: Model,
    train: object,
    test: object,
    points: Sequence[Mapping[str, Any]],
    base: SwampConfig,
    out: str | Path | None,
    arguments: Arguments,
) -> tuple[SweepResult, list[Problem]]:
    """The runs of a sweep at its points, as changes of `base`, and what each was; `arguments` are prepare's."""
    job = distributed.current()
    console = Console(base.progress and job.first)
    problems: list[Problem] = []
    for point in points:
        own = base.replace(**point)
        problem = prepare(_made(model, own.seed), train, test, arguments, config=own, settings={})
        problems.append(_sharing(problem, problems))
    runs = [_placed(problem, dict(point), out) for problem, point in zip(problems, points, strict=True)]
    _refuse_twins(runs)
    _introduce(console, model, problems, runs)
    found = SweepResult(runs)
    tell = functools.partial(_tell, found, Path(out) if out is not None and job.first else None)
    with job.watched():
        _same_runs(job, runs, out)
        packs = job.broadcast_from_first(functools.partial(_packs, problems, runs, console))
        mine = dealt(packs, problems, job.world)[job.rank]
        signals = StopSignals()
        progress = _Progress(console, {number: problems[number] for pack in mine for number in pack.numbers}, runs)
        for pack in mine:
            _run_pack(pack, problems, runs, signals, progress, tell)
        _exchange(job, problems, runs)
    console.close()
    tell()
    return found, problems


def _same_runs(job: Ranks, runs: Sequence[SweptRun], out: str | Path | None) -> None:
    """Refuse ranks whose calls differ."""
    if job.world > 1 and out is None:
        raise ValueError("a sweep over several ranks needs `out`, a folder that all of them see.")
    own = [run.id for run in runs]
    found = job.all_reduce_max([job.rank if job.broadcast_from_first(lambda: own) != own else 0])[0]
    if found:
        raise ValueError(
            f"every rank must be called with the same, but rank {found}'s settings, model or data differ from rank 0's."
        )


def _tell(found: SweepResult, out: Path | None) -> None:
    """Write the tables of the sweep's folder."""
    if out is not None:
        found.write_csv(out / "results.csv")
        found.write_csv(out / "summary.csv", found.summary())


def _exchange(job: Ranks, problems: Sequence[Problem], runs: Sequence[SweptRun]) -> None:
    """Take over what other ranks did."""
    own = {number: distributed.portable(run.error) for number, run in enumerate(runs) if run.error is not None}
    every = job.broadcast_from_first(functools.partial(_merged, job.gather_to_first(own)))
    for number, run in enumerate(runs):
        run.error = every.get(number)
        if run.result is None and run.error is None and not _finished(run, problems[number]):
            raise RuntimeError(f"rank {job.rank} can't read {run.folder}; `out` must be a folder that all ranks see.")


def _merged(parts: list[dict[int, Exception]]) -> dict[int, Exception]:
    return {number: error for part in parts for number, error in part.items()}


def without_folder(config: SwampConfig) -> SwampConfig:
    """The settings that runs share, which name no folder."""
    if config.run_dir is not None:
        raise TypeError("`run_dir` is one run's; a sweep has `out`, a folder for all of them.")
    return config


def points_of(grid: Grid) -> list[dict[str, Any]]:
    """The points of a grid: every combination of a mapping's values, or those of a list."""
    if isinstance(grid, Mapping):
        for name, values in grid.items():
            if isinstance(values, str | Mapping) or not isinstance(values, Iterable) or not list(values):
                raise TypeError(f"`grid` must have a list of values for `{name}`, got {values!r}.")
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    points = [dict(point) for point in grid]
    if not points:
        raise ValueError("`grid` is empty; give at least one point, such as {}.")
    return points


def _packs(problems: Sequence[Problem], runs: Sequence[SweptRun], console: Console) -> list[Pack]:
    """The runs that are still to be done. What a stopwatch chose for others like them is used again."""
    packs = []
    for numbers in packs_of(problems):
        waiting = [number for number in numbers if not _finished(runs[number], problems[number])]
        if not waiting:
            continue
        known = (_begun_with(runs[number], problems[number]) for number in numbers)
        engine, at_once = next((each for each in known if each), None) or _measured(
            [problems[number] for number in waiting], console
        )
        packs.append(Pack(waiting, engine, at_once))
    return packs


def _begun_with(run: SweptRun, problem: Problem) -> tuple[dict[str, Any], int] | None:
    """What a stopwatch chose for a run that was begun in this place, and how many it was trained with."""
    if problem.config.engine != "fastest" or run.folder is None or not (run.folder / "run.json").exists():
        return None
    try:
        about = RunDirectory(run.folder).about()
    except ValueError:  # what is wrong with it is told when it is opened
        return None
    engine, at_once = about["engine"], about.get("at_once", 1)
    usable = about["place"] == place_of(problem.device) and recorded_selection(engine) is not None
    return (engine, at_once) if usable and isinstance(at_once, int) and at_once > 0 else None


def _measured(problems: Sequence[Problem], console: Console) -> tuple[dict[str, Any], int]:
    """The engine for runs that can share a step, and how many at once."""
    config = problems[0].config.replace(run_dir=None, tensorboard=False, progress=False)
    with Run(dataclasses.replace(problems[0], config=config), "fast_swamp") as scratch:
        engine = start_engine(problems[0], scratch)
        at_once, why = runs_at_once(engine, problems)
    console.line(f"engine   {engine.name}, {at_once} of {len(problems)} runs at once: {why}")
    return engine.describe(), at_once


def write_csv(path: Path, rows: Sequence[dict[str, Any]], first: Sequence[str] = ()) -> Path:
    """Write rows as CSV, a column a key, those in `first` before the others."""
    write(path, csv_bytes(rows, first))
    return path


def drawn(figure: Callable[[Path], Path], path: Path, base: SwampConfig) -> None:
    """Draw a figure, or say why there is none."""
    try:
        figure(path)
    except (ImportError, ValueError) as reason:
        Console(base.progress).line(f"figure   none: {reason}")


def _made(model: Model, seed: int) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise TypeError(f"`model` must be a module or a factory of one, got {type(model).__name__}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model()


def _sharing(problem: Problem, others: Sequence[Problem]) -> Problem:
    """The problem on data that another has in memory already, if they are the same."""
    for other in others:
        same = all(problem.fingerprints[split] == other.fingerprints[split] for split in SPLITS)
        if same and (problem.device, problem.dtype) == (other.device, other.dtype):
            return dataclasses.replace(problem, train=other.train, val=other.val, test=other.test)
    return problem


def _placed(problem: Problem, point: dict[str, Any], out: str | Path | None) -> SweptRun:
    config = problem.config.to_dict()
    found = run_id({"driver": "fast_swamp", "config": config, "fingerprints": problem.fingerprints})
    shown = {name: value for name, value in point.items() if name != "layer_kept"}  # which is a table
    return SweptRun(shown, found, None if out is None else Path(out).expanduser() / "runs" / found)


def _refuse_twins(runs: Sequence[SweptRun]) -> None:
    points: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.id in points:
            raise ValueError(
                f"`grid` has the same run twice: {points[run.id]} and {run.point} compute the same. Leave one of them "
                "out."
            )
        points[run.id] = run.point


def _introduce(console: Console, model: Model, problems: Sequence[Problem], runs: Sequence[SweptRun]) -> None:
    of = "one initialisation for all" if isinstance(model, nn.Module) else "made anew under each seed"
    epochs = sum(total_particle_epochs(problem.config) for problem in problems)
    console.line(f"sweep    {len(runs)} runs, {epochs:,} particle-epochs; the model is {of}")


def _finished(run: SweptRun, problem: Problem) -> bool:
    """Take a run that is there whole over; one that is damaged is mended when it is opened."""
    if run.folder is None or not (run.folder / "run.json").exists():
        return False
    files = ["model", "masks"] + ["particles"] * problem.config.keep_particles
    if not all((run.folder / f"{name}.safetensors").exists() for name in files):
        return False
    try:
        result = SwampResult.load(run.folder, problem.original)
    except ValueError:
        return False
    if len(result.history) <= problem.config.cycles:
        return False
    run.result = result
    return True


class _Progress:
    """Tells of each cycle of each run, and how long the whole sweep will take.

    left     particle-steps of each run, by its number, until it is opened
    records  of those that were
    """

    def __init__(self, console: Console, problems: dict[int, Problem], runs: Sequence[SweptRun]) -> None:
        self.console, self.runs = console, runs
        self.left = {n: total_particle_epochs(each.config) * len(each.bounds) for n, each in problems.items()}
        self.records: dict[int, Run] = {}
        self.began: float | None = None
        self.told = False

    def opened(self, number: int, record: Run) -> None:
        """A run begins; what its console would show passes by in the sweep's."""
        self.began = time.perf_counter() if self.began is None else self.began
        self.left[number], self.records[number] = 0, record
        record.console = _SweepConsole(self)

    def status(self) -> None:
        """A step is done."""
        seconds = self.seconds_left()
        if not self.told and self.began is not None and time.perf_counter() - self.began > FIRST_ESTIMATE_SECONDS:
            self.told = True
            self.console.line(f"time     about {duration(seconds)} left at this pace")
        over = sum(run.result is not None or run.error is not None for run in self.runs)
        self.console.status(f"{over} of {len(self.runs)} runs are over, about {duration(seconds)} left")

    def cycle(self, run: SweptRun, config: SwampConfig, row: dict[str, Any]) -> None:
        """A cycle is over."""
        self.console.line(
            f"{_named(run)}: cycle {row['cycle']}/{config.cycles}, density {percent(row['density'])}, accuracy "
            f"{percent(row['accuracy'])}; the sweep has about {duration(self.seconds_left())} left"
        )

    def failed(self, number: int, error: Exception) -> None:
        """A run is over before its time."""
        self.runs[number].error = error
        self.left[number] = 0
        self.records.pop(number, None)
        self.console.line(f"{_named(self.runs[number])} ended: {type(error).__name__}: {error}")

    def seconds_left(self) -> float:
        """Of the runs that this process has."""
        done = sum(record.progress.steps_done for record in self.records.values())
        left = sum(self.left.values()) + sum(max(0, record.progress.steps_left) for record in self.records.values())
        return (time.perf_counter() - (self.began or 0.0)) / max(done, 1) * left


def _named(run: SweptRun) -> str:
    return ", ".join(f"{name} = {value}" for name, value in run.point.items()) or run.id[:8]


class _SweepConsole(Console):
    """The console of one run: only that it goes on is seen."""

    def __init__(self, progress: _Progress) -> None:
        super().__init__(False)
        self.progress = progress

    def status(self, text: str) -> None:
        """A step is done."""
        self.progress.status()


def _run_pack(
    pack: Pack,
    problems: Sequence[Problem],
    runs: Sequence[SweptRun],
    signals: StopSignals,
    progress: _Progress,
    tell: Callable[[], None],
) -> None:
    """Do the runs of a pack, as many at once as it says; tell the user after each such group."""
    engine: Engine | None = None
    for begin in range(0, len(pack.numbers), pack.at_once):
        group: dict[int, Run] = {}
        begun: dict[int, bool] = {}
        with ExitStack() as stack:
            for number in pack.numbers[begin : begin + pack.at_once]:
                try:
                    record = Run(_quiet(problems[number], runs[number], progress), "fast_swamp")
                    record.signals = signals  # one wish to stop is all runs'
                    progress.opened(number, record)
                    group[number] = stack.enter_context(record)
                    record.about["at_once"] = pack.at_once
                    begun[number] = bool(record.engine)
                    record.keep_engine(record.engine or copy.deepcopy(pack.engine))
                except Exception as error:
                    group.pop(number, None)
                    progress.failed(number, error)
            if not group:
                continue
            for alike in _by_engine(group):  # one that was begun elsewhere may have another engine
                first = next(iter(alike))
                try:
                    engine = _engine_for(alike[first], begun[first], engine)
                    trainings = [swamp(each.problem, engine, each) for each in alike.values()]
                    ends: Sequence[SwampResult | Exception] = packed(engine, trainings)
                except Exception as error:
                    ends = [error] * len(alike)
                for number, end in zip(alike, ends, strict=True):
                    if isinstance(end, Exception):
                        progress.failed(number, end)
                    else:
                        runs[number].result = end
        tell()


def _by_engine(group: Mapping[int, Run]) -> list[dict[int, Run]]:
    """The runs of a group by the engine that each has recorded."""
    found: dict[str, dict[int, Run]] = {}
    for number, record in group.items():
        found.setdefault(str(record.engine.get("name")), {})[number] = record
    return list(found.values())


def _engine_for(record: Run, begun: bool, there: Engine | None) -> Engine:
    """The engine of a pack, as the run recorded it if it was begun before."""
    if there is None or there.name != record.engine.get("name"):
        return start_engine(record.problem, record)
    if begun:
        there.replay(record.engine)
    return there


def _quiet(problem: Problem, run: SweptRun, progress: _Progress) -> Problem:
    """The problem in its folder, told of by the sweep alone."""
    config = problem.config.replace(progress=False, run_dir=None if run.folder is None else str(run.folder))
    return dataclasses.replace(problem, config=config, on_cycle=lambda row: progress.cycle(run, config, row))


def spread_of(score: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """A score's mean and standard deviation over at least one row, {} unless all have it."""
    values = [row[score] for row in rows]
    if any(value is None for value in values):
        return {}
    mean, spread = mean_and_spread(values)
    return {score: mean, f"{score}_std": spread}
