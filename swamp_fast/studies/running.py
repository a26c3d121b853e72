"""Run the packs of one process: open their runs, train them together, and record their results or errors."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from swamp_fast.driver import swamp
from swamp_fast.engines.start import Engine, start_engine
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.console import Console
from swamp_fast.runs.record import Run
from swamp_fast.runs.result import SwampResult
from swamp_fast.runs.signals import StopSignals
from swamp_fast.studies.packing import Pack
from swamp_fast.studies.progress import SweepProgress
from swamp_fast.studies.result import SweptRun
from swamp_fast.studies.together import run_together


@dataclass(frozen=True)
class _OpenRun:
    """A run whose folder is open. `resumed` says whether an engine was already recorded in the folder."""

    record: Run
    resumed: bool


class PackRunner:
    """Runs the packs of one process, one after the other.

    on_group  is called after each group of runs that were trained at once
    """

    def __init__(
        self, problems: Sequence[Problem], runs: Sequence[SweptRun], console: Console, on_group: Callable[[], None]
    ) -> None:
        self.problems, self.runs, self.console, self.on_group = problems, runs, console, on_group
        self.signals = StopSignals()  # shared by all runs, so that a signal stops the whole sweep

    def run(self, packs: Sequence[Pack]) -> None:
        """Run all packs. If a run fails, its error is recorded and the other runs continue."""
        numbers = [number for pack in packs for number in pack.numbers]
        self.progress = SweepProgress(self.console, {number: self.problems[number] for number in numbers}, self.runs)
        for pack in packs:
            self.run_pack(pack)

    def run_pack(self, pack: Pack) -> None:
        """Run a pack in groups of `pack.at_once` runs."""
        engine: Engine | None = None
        for begin in range(0, len(pack.numbers), pack.at_once):
            with ExitStack() as stack:
                group = self._open(pack, pack.numbers[begin : begin + pack.at_once], stack)
                for part in _by_engine(group):
                    engine = self._run_group(part, engine)
            self.on_group()

    def _open(self, pack: Pack, numbers: Iterable[int], stack: ExitStack) -> dict[int, _OpenRun]:
        """Open runs, which `stack` will close. Runs without a recorded engine get the pack's."""
        opened: dict[int, _OpenRun] = {}
        for number in numbers:
            try:
                record = Run(
                    self._in_its_folder(number),
                    "fast_swamp",
                    console=self.progress.run_console,
                    signals=self.signals,
                    at_once=pack.at_once,
                )
                self.progress.opened(number, record)
                stack.enter_context(record)
                resumed = bool(record.engine)
                record.keep_engine(record.engine or copy.deepcopy(pack.engine))
                opened[number] = _OpenRun(record, resumed)
            except Exception as error:
                self.progress.failed(number, error)
        return opened

    def _in_its_folder(self, number: int) -> Problem:
        """The problem of a run, set to write into the run's folder and to show its cycles in the sweep's progress.

        The callbacks' rows get the run's id and point.
        """
        problem, run = self.problems[number], self.runs[number]
        config = problem.config.replace(progress=False, run_dir=None if run.folder is None else str(run.folder))

        def show(row: dict[str, Any]) -> None:
            self.progress.cycle(run, config, row)

        on_epoch = problem.on_epoch and _of_run(run, problem.on_epoch)
        on_cycle = _of_run(run, problem.on_cycle, show) if problem.on_cycle else show
        return dataclasses.replace(problem, config=config, on_epoch=on_epoch, on_cycle=on_cycle)

    def _run_group(self, group: Mapping[int, _OpenRun], engine: Engine | None) -> Engine | None:
        """Train runs together on the engine that they have recorded, and return that engine.

        engine  the engine of the group before, which is used again if it is the recorded one
        """
        ends: Sequence[SwampResult | Exception]
        try:
            engine = _engine_of(next(iter(group.values())), engine)
            ends = run_together(engine, [swamp(run.record.problem, engine, run.record) for run in group.values()])
        except Exception as error:
            ends = [error] * len(group)
        for (number, run), end in zip(group.items(), ends, strict=True):
            try:
                self.runs[number].result = run.record.until_stopped(functools.partial(_returned, end))
            except Exception as error:
                self.progress.failed(number, error)
        return engine


def _returned(end: SwampResult | Exception) -> SwampResult:
    """Return the result of a run, or raise the error that ended it."""
    if isinstance(end, Exception):
        raise end
    return end


def _of_run(
    run: SweptRun, callback: Callable[..., object], before: Callable[[dict[str, Any]], None] | None = None
) -> Callable[..., object]:
    """A callback of the sweep as that of one of its runs. It has the signature of `callback`.

    before  is called first, with the row as it is
    """

    def called(row: dict[str, Any], *snapshot: Any) -> object:
        if before is not None:
            before(row)
        return callback({**row, "run": run.id, "point": dict(run.point)}, *snapshot)

    return functools.update_wrapper(called, callback, assigned=(), updated=())


def _by_engine(group: Mapping[int, _OpenRun]) -> list[dict[int, _OpenRun]]:
    """Split a group by recorded engine: a run that was begun on another machine may have another engine."""
    parts: dict[str, dict[int, _OpenRun]] = {}
    for number, run in group.items():
        parts.setdefault(str(run.record.engine.get("name")), {})[number] = run
    return list(parts.values())


def _engine_of(run: _OpenRun, engine: Engine | None) -> Engine:
    """The engine that a run has recorded: `engine` if the names are equal, else a newly started one."""
    if engine is None or engine.name != run.record.engine.get("name"):
        return start_engine(run.record.problem, run.record)
    if run.resumed:
        engine.replay(run.record.engine)
    return engine
