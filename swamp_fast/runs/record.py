"""Run keeps the record of one run, its history and its folder, while the run is under way. Both drivers use it."""

from __future__ import annotations

import copy
import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from swamp_fast.common.memory import peak_memory
from swamp_fast.common.modes import surrounding_modes
from swamp_fast.common.timing import Stopwatch
from swamp_fast.distributed import ALONE, Ranks
from swamp_fast.particles.random import generators_left_alone
from swamp_fast.particles.schedule import total_particle_epochs
from swamp_fast.problem.arguments import StopRun, takes
from swamp_fast.problem.problem import Problem
from swamp_fast.runs import lock
from swamp_fast.runs.checkpointing import StopPolicy
from swamp_fast.runs.console import Console, cycle_line, introduction
from swamp_fast.runs.cycle_warnings import dropped_text, found_in_cycle, found_in_settings, show
from swamp_fast.runs.files import Damaged
from swamp_fast.runs.folder import Packed, RunDirectory, Snapshot, Unfinished, run_id
from swamp_fast.runs.progress import Progress
from swamp_fast.runs.result import SwampResult, snapshot_of
from swamp_fast.runs.resume import FINGERPRINT_NAMES, Found, found_in, place_of
from swamp_fast.runs.signals import StopSignals
from swamp_fast.runs.tensorboard import Events
from swamp_fast.version import __version__

State = dict[str, Tensor]
Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def first_rank_decides(
    decision: Callable[Concatenate[Problem, Run, Arguments], Value],
) -> Callable[Concatenate[Problem, Run, Arguments], Value]:
    """Decorate a function of a run so that only the first rank calls it. Every rank gets its result or its error."""

    def on_every_rank(problem: Problem, run: Run, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        return run.ranks.broadcast_from_first(lambda: decision(problem, run, *args, **kwargs))

    functools.update_wrapper(on_every_rank, decision)
    return on_every_rank


class Run:
    """One run of a driver. As a context manager, it holds the folder's lock and restores the user's random generators.

    rows        the history so far
    snapshots   each cycle's average: compact in memory, or the path of its file
    ticket      the ticket's parameters and buffers; None before it is trained
    unfinished  the checkpoint of an interrupted training that the folder held; None once that training is complete
    about       the content of run.json
    ranks       the processes that share the run; only the first uses the folder and the console, but all keep the
                same history
    progress    counts steps and estimates the time left
    stops       decides when to write a checkpoint and when to stop
    stopwatch   measures the seconds of the current cycle
    """

    def __init__(
        self,
        problem: Problem,
        driver: str,
        ranks: Ranks = ALONE,
        *,
        console: Console | None = None,
        signals: StopSignals | None = None,
        at_once: int | None = None,
    ) -> None:
        """A sweep passes a console and signals that its runs share, and the number of runs that it trains at once."""
        self.problem, self.config, self.ranks = problem, problem.config, ranks
        if ranks.world > 1 and problem.probe.keeps_state:
            raise ValueError(
                f"the model's forward keeps state in plain attributes, which {ranks.world} processes can't exchange; "
                "run it in one process, or keep the state in buffers."
            )
        if self.config.tensorboard and self.config.run_dir is None:
            raise ValueError("`tensorboard` writes into run_dir, got run_dir = None; name a folder.")
        self.console = console if console is not None else Console(self.config.progress and ranks.first)
        self.signals = signals if signals is not None else StopSignals()
        self.progress = Progress(self.console)
        self.stops = StopPolicy(self.config, ranks, self.signals)
        self.stopwatch = Stopwatch()
        self.ended_early = False  # by StopRun in a callback
        self.calls_on_epoch = False
        self.warned_not_saved = False
        self.on_cycle_needs_snapshot = problem.on_cycle is not None and not takes(problem.on_cycle, 1)
        self.rows: list[dict[str, Any]] = []
        self.snapshots: list[Packed | Path] = []
        self.ticket: State | None = None
        self.particles: State | None = None
        self.unfinished: Unfinished | None = None
        self.pending_warnings: list[str] = []  # the next row's list of warnings begins with these
        self.about = about_run(problem, driver)
        if at_once is not None:
            self.about["at_once"] = at_once
        self.folder = RunDirectory(self.config.run_dir) if self.config.run_dir is not None and ranks.first else None
        self.events: Events | None = None
        if self.config.tensorboard and self.folder is not None:
            self.events = Events(self.folder.path / "tensorboard", self.config.ticket_epochs, self.config.epochs)
        self._context = ExitStack()

    def __enter__(self) -> Run:
        """Open the folder, continue the run that it holds, if any, and print the introduction."""
        with ExitStack() as stack:
            stack.enter_context(generators_left_alone())
            if self.problem.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.problem.device))  # where streams and graphs are made
            self._refuse_different_calls()
            self._continue(self.ranks.broadcast_from_first(lambda: self._open(stack)))
            # Other ranks may have been called without the callback.
            self.calls_on_epoch = self.ranks.broadcast_from_first(lambda: self.problem.on_epoch is not None)
            if self.config.run_dir is not None:
                stack.enter_context(self.signals)
            for text in introduction(self.problem, self.about["driver"], self.unfinished, len(self.rows)):
                self.console.line(text)
            self._context = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the terminal, the signals, the folder and the random generators."""
        self.console.close()
        if self.events is not None:
            self.events.close()
        if error is not None and self.rows:
            with suppress(AttributeError):  # an exception whose class forbids attributes
                error.result = self._result_so_far()  # type: ignore[attr-defined]
            if self.folder is None:
                self.console.line(
                    f"stopped  by {type(error).__name__}; its attribute `result` holds {len(self.rows)} of "
                    f"{self.config.cycles + 1} cycles"
                )
        self._context.__exit__(kind, error, trace)
        if kind is None and self.signals.received is not None:
            self.signals.stop(self.signals.received)

    @property
    def engine(self) -> dict[str, Any]:
        """The description of the engine and its choices; empty before an engine is chosen."""
        engine: dict[str, Any] = self.about["engine"]
        return engine

    # Methods by which the drivers record results.

    def keep_engine(self, engine: dict[str, Any]) -> None:
        """Record the engine and its choices, so that a resumed run repeats them."""
        self.about["engine"] = engine
        if self.folder is not None:
            self.folder.write_about(self.about)

    def share_engine(self, describe: Callable[[], dict[str, Any]]) -> None:
        """Record the first rank's engine on every rank; only the first rank calls `describe`."""
        self.keep_engine(self.ranks.broadcast_from_first(describe))

    def keep_ticket(self, state: State) -> None:
        """Record the ticket's parameters and buffers."""
        self.ticket = _copies(state)
        if self.folder is not None:
            self.folder.write_ticket(self.ticket)
        self._training_is_complete()

    def keep_epoch(
        self,
        cycle: int | None,
        epoch: int,
        losses: list[float],
        *,
        particle: int | None = None,
        before_stop: Callable[[], object] = lambda: None,
    ) -> None:
        """Write an epoch's mean training losses to TensorBoard, if it is on, and call `on_epoch`.

        cycle        None for the ticket's training
        losses       of all particles, or of `particle` alone
        before_stop  is called on every rank if `on_epoch` ends the run, before StopRun is raised
        """
        if self.events is not None:
            self.events.epoch(cycle, epoch, losses, particle or 0)
        if not self.calls_on_epoch:
            return
        epochs = self.config.ticket_epochs if cycle is None else self.config.epochs
        row: dict[str, Any] = {"cycle": cycle, "epoch": epoch, "epochs": epochs, "train_loss": losses}
        row |= {} if particle is None else {"particle": particle}
        where = f"epoch {epoch + 1} of {epochs} of {'the ticket' if cycle is None else f'cycle {cycle}'}"
        if self._callback_ends_run("on_epoch", where, lambda: (copy.deepcopy(row),)):
            before_stop()
            raise StopRun

    def keep_training(self, state: Unfinished) -> None:
        """Write a checkpoint of the unfinished training; without a folder, nothing is written."""
        if self.events is not None:
            self.events.flush()
        if self.folder is not None:
            self.folder.write_training(state)
        self.stops.checkpoint_was_written()

    def keep_cycle(self, state: State, masks: State, row: dict[str, Any], score: State) -> None:
        """Record a completed cycle, print its line, and call `on_cycle`.

        state  parameters and buffers of the cycle's average
        row    the cycle's row of the history, without time, memory and warnings, which are added here
        score  see Snapshot
        """
        row |= {"seconds": self.stopwatch.seconds, "peak_memory": peak_memory(self.problem.device)}
        masks_before = self.last().masks if self.snapshots else {}
        dropped = [dropped_text(row["cycle"], each["lane"], each["epoch"]) for each in row["dropped"]]
        new_warnings = found_in_cycle(row, state, masks, masks_before)
        of_settings = found_in_settings(self.config, self.problem.steps_per_epoch) if row["cycle"] == 0 else []
        row["warnings"] = self.pending_warnings + of_settings + dropped + new_warnings
        self.pending_warnings = []
        if self.ranks.first:
            show(new_warnings)
        self.rows.append(row)
        snapshot = Snapshot(state, masks, row, score)
        if self.events is not None:  # before the cycle's file, so that a run killed in between writes the events again
            self.events.cycle(row)
        if self.folder is not None:
            self.folder.write_cycle(row["cycle"], snapshot, self.rows)
            self.snapshots.append(self.folder.cycle_path(row["cycle"]))
        else:
            self.snapshots.append(snapshot.packed())
        self._training_is_complete()
        self.console.line(cycle_line(row, self.config.cycles))
        where = f"cycle {row['cycle']} of {self.config.cycles}"
        self._callback_ends_run("on_cycle", where, lambda: self._arguments_of_on_cycle(snapshot))

    def keep_particles(self, states: list[State]) -> None:
        """Record the particles of the last cycle; an empty list does nothing."""
        if not states:
            return
        self.particles = {name: torch.stack([state[name].detach().cpu() for state in states]) for name in states[0]}
        if self.folder is not None:
            self.folder.write_particles(len(self.rows), self.particles)

    def warn_dropped(self, cycle: int, lane: int, epoch: int) -> None:
        """Warn at once that a particle diverged and is dropped; the cycle's row will have the warning too."""
        if self.ranks.first:
            show([dropped_text(cycle, lane, epoch)])

    def warn_not_saved(self, reason: str) -> None:
        """Warn once that a checkpoint inside a training can't be written."""
        if self.ranks.first and not self.warned_not_saved:
            self.warned_not_saved = True
            show([f"no checkpoint inside a cycle is written: the recipe's optimizer keeps {reason}."])

    # Methods by which the drivers read what was recorded.

    def remaining_cycles(self) -> Iterator[int]:
        """Yield the cycles that are still to be done, and restart the stopwatch with each of them."""
        while len(self.rows) <= self.config.cycles and not self.ended_early:
            self.stopwatch.restart()
            yield len(self.rows)

    def last(self) -> Snapshot:
        """Return the snapshot of the newest completed cycle."""
        return snapshot_of(self.snapshots[-1])

    def masks_source(self) -> Snapshot:
        """Return the snapshot from which the next mask is made. Only for the first rank, which has the files."""
        return snapshot_of(self.snapshots[0]) if self.config.mask_from == "dense" else self.last()

    def checkpoint_of(self, cycle: int | None) -> Unfinished | None:
        """Return the folder's checkpoint of a cycle's training, or of the ticket's if the cycle is None.

        Returns None if there is no such checkpoint.
        """
        return self.unfinished if self.unfinished is not None and self.unfinished.cycle == cycle else None

    def seconds_before(self, cycle: int | None) -> float:
        """Return the seconds that a training took in earlier, interrupted processes; cycle None is the ticket."""
        checkpoint = self.checkpoint_of(cycle)
        return 0.0 if checkpoint is None else checkpoint.seconds

    def go_back_to(self, step: int) -> None:
        """Continue from the checkpoint after `step` steps, if that is the newest checkpoint or the one before it."""
        newest = self.unfinished
        if self.folder is None or newest is None or newest.steps == step:
            return
        path = self.folder.training_paths()[1]
        with suppress(Damaged):
            earlier = self.folder.training(path) if path.exists() else newest
            if (earlier.cycle, earlier.steps) == (newest.cycle, step):
                self.unfinished = earlier

    def until_stopped(self, drive: Callable[[], SwampResult]) -> SwampResult:
        """Return what `drive` returns. If `on_epoch` ends the run, return the result of the cycles before.

        Raises RuntimeError if there are none.
        """
        try:
            return drive()
        except StopRun as stop:
            if not self.ended_early:  # raised by something else of the user's
                raise
            if not self.rows:
                raise RuntimeError(
                    "`on_epoch` raised StopRun before any cycle was finished, so there is no result to return. Let "
                    "the run finish cycle 0, or raise another exception to end the call."
                ) from stop
        return self.result()

    def result(self) -> SwampResult:
        """Return the result of the run, and write the files that only a finished run has."""
        result = self._result_so_far()
        if self.folder is not None:
            result.write_final(self.folder)
        return result

    def _result_so_far(self) -> SwampResult:
        assert self.ticket is not None
        return SwampResult(
            history=self.rows,
            ticket=self.ticket,
            particles=self.particles,
            engine=self.engine,
            config=self.config,
            standardise=self.about["standardise"],
            snapshots=self.snapshots,
            about=self.about,
            template=self.problem.original,
        )

    def _callback_ends_run(self, name: str, where: str, arguments: Callable[[], tuple[Any, ...]]) -> bool:
        """Call a callback on the first rank. Returns on every rank whether it raised StopRun.

        arguments  makes the callback's arguments, copies of what is recorded
        """
        self.ended_early = self.ranks.broadcast_from_first(lambda: self._call(name, where, arguments))
        return self.ended_early

    def _call(self, name: str, where: str, arguments: Callable[[], tuple[Any, ...]]) -> bool:
        callback = getattr(self.problem, name)
        if callback is None:
            return False
        try:
            with surrounding_modes():
                callback(*arguments())
        except StopRun:
            self.console.line(f"stopped  by {name} after {where}")
            return True
        except StopIteration as error:
            raise RuntimeError(
                f"`{name}` raised StopIteration; raise swamp_fast.StopRun to end the run with what there is."
            ) from error
        return False

    def _arguments_of_on_cycle(self, kept: Snapshot) -> tuple[Any, ...]:
        """Return a copy of the cycle's row and, if `on_cycle` needs two arguments, of the cycle's snapshot."""
        row = copy.deepcopy(kept.row)
        if not self.on_cycle_needs_snapshot:
            return (row,)
        return row, Snapshot(_copies(kept.state), _copies(kept.masks), copy.deepcopy(row), _copies(kept.score))

    # Methods that trainings call before their first step and between steps.

    def begin_training(self) -> None:
        """Before a training, raise KeyboardInterrupt or SystemExit if a signal requested a stop."""
        self.stops.between_trainings(self.console)

    def step(self, particles: int, where: str) -> bool:
        """Count a training step of `particles` particles. Returns whether to write a checkpoint now."""
        self.progress.step(particles, where)
        return self.stops.checkpoint_is_due()

    def stop_if_requested(self) -> None:
        """Raise KeyboardInterrupt or SystemExit if a signal requested a stop."""
        self.stops.stop_if_requested(self.console)

    def _training_is_complete(self) -> None:
        self.unfinished = None
        self.stops.checkpoint_was_written()
        if self.folder is not None:
            self.folder.forget_training()

    def _refuse_different_calls(self) -> None:
        """Raise ValueError on every rank if the ranks' calls differ."""
        # run_id leaves out these two settings, but they decide which messages ranks exchange, so ranks must agree.
        together = (self.config.run_dir is None, self.config.on_divergence)
        own = {"the settings": (run_id({**self.about, "fingerprints": {}}), together), **self.problem.fingerprints}
        first_ranks = self.ranks.broadcast_from_first(lambda: own)
        differences = [name for name in {**own, **first_ranks} if first_ranks.get(name) != own.get(name)]
        rank = self.ranks.all_reduce_max([self.ranks.rank if differences else 0])[0]
        if rank:
            names = ", ".join(FINGERPRINT_NAMES.get(name, name) for name in differences)
            raise ValueError(
                f"every rank must make the same call, but rank {rank}'s differs from rank 0's"
                f"{f': {names}' if names else ''}. A model with random weights needs the same seed on every rank."
            )

    def _open(self, stack: ExitStack) -> Found | None:
        """Lock the folder, and read the run that it holds. If it is empty, begin a run there and return None."""
        if self.folder is None:
            return None
        self.folder.make()
        stack.enter_context(lock.locked(self.folder.path))
        if self.folder.is_empty():
            self.folder.create(self.about, self.config.to_toml())
            return None
        if not self.config.resume:
            raise ValueError(
                f"run_dir {self.folder.path} holds a run already, and resume=False; name an empty or new folder."
            )
        return found_in(self.folder, self.config, self.about)

    def _continue(self, found: Found | None) -> None:
        """Continue the run that was found in the folder, if any, and count the steps that are left."""
        if found is not None:
            self._take_over(found)
        elif self.ranks.first:
            show(found_in_settings(self.config, self.problem.steps_per_epoch))
        steps = 0 if self.unfinished is None else self.unfinished.steps
        if self.events is not None:
            # A training resumed at the end of an epoch writes that epoch's losses again.
            self.events.resume(self.rows, self.ticket is not None, max(steps - 1, 0) // self.problem.steps_per_epoch)
        config = self.config
        epochs_left = total_particle_epochs(config) - (config.ticket_epochs if self.ticket is not None else 0)
        epochs_left -= sum(config.particles_at(row["cycle"]) for row in self.rows) * config.epochs
        self.progress.steps_left = epochs_left * self.problem.steps_per_epoch
        if self.unfinished is not None:
            cycle = self.unfinished.cycle
            self.progress.steps_left -= steps * (1 if cycle is None else config.particles_at(cycle))

    def _take_over(self, found: Found) -> None:
        self.ticket, self.rows, self.particles = found.ticket, found.rows, found.particles
        self.unfinished, self.pending_warnings = found.unfinished, found.warnings
        self.snapshots = [*found.snapshots]
        self.about |= {"engine": found.engine, "moved": found.moved, "began": found.began}
        if self.folder is None:
            return
        if found.prolonged or found.elsewhere:
            self.folder.write_about(self.about, self.config.to_toml())
        self.folder.write_history(self.rows)  # a killed run may have written a cycle's file but not its history line


def _copies(tensors: State) -> State:
    """Return copies of named tensors in the processor's memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def about_run(problem: Problem, driver: str) -> dict[str, Any]:
    """Return the content of run.json for a new run."""
    return {
        "driver": driver,
        "version": __version__,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "lines": list(problem.lines),
        "config": problem.config.to_dict(),
        "fingerprints": problem.fingerprints,
        "standardise": problem.standardise.to_dict() if problem.standardise else None,
        "engine": {},
        "where": f"{platform.platform()}, {problem.device}, torch {torch.__version__}",
        "place": place_of(problem.device),
        "moved": [],
    }
