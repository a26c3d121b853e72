"""Sweeps: many runs over a grid of settings, those that can share a step packed into one bank, none computed twice."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast import ranks
from swamp_fast.checkpoint import RunDirectory, run_id, write
from swamp_fast.config import SwampConfig
from swamp_fast.driver import swamp
from swamp_fast.engines import start_engine
from swamp_fast.pack import packed, runs_at_once
from swamp_fast.probe import Forward, Loss
from swamp_fast.problem import SPLITS, Problem, prepare
from swamp_fast.prunable import Prunable
from swamp_fast.ranks import Ranks
from swamp_fast.report.console import Console, duration, percent
from swamp_fast.report.figures import accuracy_of_points
from swamp_fast.result import SwampResult
from swamp_fast.run import Run, one_at_a_time
from swamp_fast.schedule import total_particle_epochs

Model = nn.Module | Callable[[], nn.Module]
Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]

# Settings that may differ between the runs of a pack: they are values of a lane, or of what is done between trainings.
PER_RUN = (
    *("seed", "lr", "swa_lr", "swa_start", "momentum", "beta1", "beta2", "adam_eps", "weight_decay", "swa", "schedule"),
    *("prune", "cycles", "target_density", "rewind", "combine", "mask_score", "mask_from"),
)
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
        """A row a run and cycle: id, the run's point, and the history's numbers; a run that failed has its error."""
        rows = []
        for run in self.runs:
            history = [{}] if run.result is None else run.result.history
            for row in history:
                plain = {name: value for name, value in row.items() if isinstance(value, int | float | None)}
                error = "" if run.error is None else f"{type(run.error).__name__}: {run.error}"
                rows.append({"id": run.id, **run.point, **plain, "error": error})
        return rows

    def summary(self) -> list[dict[str, Any]]:
        """A row a point without its seed and cycle: how many seeds, and each score's mean and standard deviation."""
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
            | {name: value for score in SCORES for name, value in _spread(score, rows).items()}
            for key, rows in groups.items()
        ]

    def write_csv(self, path: str | Path, rows: list[dict[str, Any]] | None = None) -> Path:
        """Write `rows()`, or other rows, as CSV."""
        return write_csv(Path(path), self.rows() if rows is None else rows)

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
    transform: Callable[[Any], Any] | None = None,
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
    base = SwampConfig.of(config, without_folder(common))
    arguments = {"val": val, "forward": forward, "loss": loss, "transform": transform}
    arguments |= {"prunable": prunable, "initial_masks": initial_masks}
    found = SweepResult(swept(model, train, test, points, base, out, arguments)[0])
    if out is not None and ranks.current().first:
        found.write_csv(Path(out) / "results.csv")
        found.write_csv(Path(out) / "summary.csv", found.summary())
        drawn(found.figure, Path(out) / "accuracy.png", base)
    return found


def swept(
    model: Model,
    train: object,
    test: object,
    points: Sequence[Mapping[str, Any]],
    base: SwampConfig,
    out: str | Path | None,
    arguments: Mapping[str, Any],
) -> tuple[list[SweptRun], list[Problem]]:
    """The runs of a sweep at its points, as changes of `base`, and what each was; `arguments` are prepare's."""
    console = Console(base.progress)
    problems: list[Problem] = []
    for point in points:
        own = base.replace(**point)
        problem = prepare(_made(model, own.seed), train, test, config=own, settings={}, **arguments)
        problems.append(_sharing(problem, problems))
    runs = [_placed(problem, dict(point), out) for problem, point in zip(problems, points, strict=True)]
    _refuse_twins(runs)
    _introduce(console, model, problems, runs)
    job = ranks.current()
    if job.world > 1 and out is None:
        raise ValueError("a sweep over several ranks needs `out`, a folder that all of them see.")
    with job.watched():
        waiting = job.decided(
            lambda: [number for number, run in enumerate(runs) if not _finished(run, problems[number])]
        )
        _do(problems, runs, waiting[job.rank :: job.world], console)
        _exchange(job, problems, runs)
    console.close()
    return runs, problems


def _do(problems: Sequence[Problem], runs: Sequence[SweptRun], waiting: Sequence[int], console: Console) -> None:
    """Do the runs of some places, those that can share a step in one bank."""
    progress = _Progress(console, {runs[number].id: epochs_from(problems[number].config, 0) for number in waiting})
    for pack in packs_of([problems[number] for number in waiting]):
        numbers = [waiting[place] for place in pack]
        _run_pack([problems[number] for number in numbers], [runs[number] for number in numbers], progress)


def _exchange(job: Ranks, problems: Sequence[Problem], runs: Sequence[SweptRun]) -> None:
    """Take over what other ranks did."""
    own = {number: run.error for number, run in enumerate(runs) if run.error is not None}
    every = job.decided(functools.partial(_merged, job.collected(own)))
    for number, run in enumerate(runs):
        run.error = every.get(number)
        if run.result is None and run.error is None:
            _finished(run, problems[number])


def _merged(parts: list[dict[int, Exception]]) -> dict[int, Exception]:
    return {number: error for part in parts for number, error in part.items()}


def without_folder(common: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that runs share, which name no folder."""
    if common.get("run_dir") is not None:
        raise TypeError("`run_dir` is one run's; a sweep has `out`, a folder for all of them.")
    return common


def points_of(grid: Grid) -> list[dict[str, Any]]:
    """The points of a grid: every combination of a mapping's values, or those of a list."""
    if isinstance(grid, Mapping):
        for name, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise TypeError(f"`grid` must have a list of values for `{name}`, got {values!r}.")
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    points = [dict(point) for point in grid]
    if not points:
        raise ValueError("`grid` is empty; give at least one point, such as {}.")
    return points


def packs_of(problems: Sequence[Problem]) -> list[list[int]]:
    """Which runs can share a step, by their places: of the same model and settings, but for those of a lane."""
    packs: dict[str, list[int]] = {}
    for place, problem in enumerate(problems):
        settings = {name: value for name, value in problem.config.identity().items() if name not in PER_RUN}
        if problem.config.clip_norm is not None:
            settings["clip_norm"] = "a value of a lane"
        shape = [(entry.name, entry.shape, entry.prunable) for entry in problem.layout.entries]
        others = {name: each for name, each in problem.fingerprints.items() if name not in ("model", "mask")}
        packs.setdefault(repr((settings, shape, others)), []).append(place)
    return list(packs.values())


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as CSV, a column a key."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())
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
    return SweptRun(point, found, None if out is None else Path(out).expanduser() / "runs" / found)


def _refuse_twins(runs: Sequence[SweptRun]) -> None:
    points: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.id in points:
            raise ValueError(f"`grid` has the same run twice: {points[run.id]} and {run.point}. Leave one of them out.")
        points[run.id] = run.point


def _introduce(console: Console, model: Model, problems: Sequence[Problem], runs: Sequence[SweptRun]) -> None:
    of = "one initialisation for all" if isinstance(model, nn.Module) else "made anew under each seed"
    epochs = sum(total_particle_epochs(problem.config) for problem in problems)
    console.line(f"sweep    {len(runs)} runs, {epochs:,} particle-epochs; the model is {of}")


def _finished(run: SweptRun, problem: Problem) -> bool:
    """Take a run that is there over."""
    if run.folder is None or not (run.folder / "run.json").exists():
        return False
    folder = RunDirectory(run.folder)
    folder.about()
    if folder.cycles_done() <= problem.config.cycles:
        return False
    run.result = SwampResult.load(run.folder, problem.original)
    return True


class _Progress:
    """Tells of each cycle of each run, and how long the whole sweep will take.

    left  particle-epochs of each run's cycles to come, by its id
    """

    def __init__(self, console: Console, left: dict[str, int]) -> None:
        self.console, self.left, self.done = console, left, 0
        self.began = time.perf_counter()

    def cycle(self, run: SweptRun, config: SwampConfig, row: dict[str, Any]) -> None:
        """A cycle is over."""
        self.done += row["particles"] * config.epochs
        self.left[run.id] = epochs_from(config, row["cycle"] + 1)
        seconds = (time.perf_counter() - self.began) / self.done * sum(self.left.values())
        point = ", ".join(f"{name} = {value}" for name, value in run.point.items()) or run.id[:8]
        self.console.line(
            f"{point}: cycle {row['cycle']}/{config.cycles}, density {percent(row['density'])}, accuracy "
            f"{percent(row['accuracy'])}; the sweep has about {duration(seconds)} left"
        )

    def failed(self, run: SweptRun) -> None:
        """A run is over before its time."""
        self.left[run.id] = 0
        self.console.line(f"{run.point} ended: {type(run.error).__name__}: {run.error}")


def epochs_from(config: SwampConfig, cycle: int) -> int:
    """Particle-epochs of the cycles from one on."""
    return sum(config.particles_at(later) for later in range(cycle, config.cycles + 1)) * config.epochs


def _run_pack(problems: Sequence[Problem], runs: Sequence[SweptRun], progress: _Progress) -> None:
    """Do runs that can share a step, as many at once as measured best."""
    problems = [_quiet(problem, run, progress) for problem, run in zip(problems, runs, strict=True)]
    records = [Run(problem, "fast_swamp") for problem in problems]
    for record in records:
        record.signals = records[0].signals  # one wish to stop is all runs'
    with ExitStack() as stack:
        for record in records:
            stack.enter_context(record)
        first = next((record for record in records if record.engine), records[0])
        engine = start_engine(problems[records.index(first)], first)
        at_once, why = runs_at_once(engine, problems)
        progress.console.line(f"engine   {engine.name}, {at_once} of {len(problems)} runs at once: {why}")
        for begin in range(0, len(problems), at_once):
            group = range(begin, min(begin + at_once, len(problems)))
            ends = packed(engine, [swamp(problems[number], engine, records[number]) for number in group])
            for number, end in zip(group, ends, strict=True):
                if isinstance(end, Exception):
                    runs[number].error = end
                    progress.failed(runs[number])
                else:
                    runs[number].result = end


def _quiet(problem: Problem, run: SweptRun, progress: _Progress) -> Problem:
    """The problem in its folder, told of by the sweep alone."""
    config = problem.config.replace(progress=False, run_dir=None if run.folder is None else str(run.folder))
    return dataclasses.replace(problem, config=config, on_cycle=lambda row: progress.cycle(run, config, row))


def _spread(score: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """A score's mean and standard deviation over rows, if all have it."""
    values = [row[score] for row in rows]
    if any(value is None for value in values):
        return {}
    return {score: statistics.fmean(values), f"{score}_std": statistics.stdev(values) if len(values) > 1 else 0.0}
