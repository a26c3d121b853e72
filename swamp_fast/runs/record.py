"""One run as it goes: its history, its folder, and what is shown of it. Both drivers record into it."""

from __future__ import annotations

import platform
import signal
import time
import warnings
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.format import duration, percent
from swamp_fast.distributed import ALONE, Ranks
from swamp_fast.particles.random import generators_left_alone
from swamp_fast.particles.schedule import total_particle_epochs
from swamp_fast.problem.problem import Problem
from swamp_fast.runs import lock
from swamp_fast.runs.checkpoint import Damaged, Packed, RunDirectory, Snapshot, Unfinished, run_id, save_tensors
from swamp_fast.runs.console import Console
from swamp_fast.runs.result import SwampResult, snapshot_of
from swamp_fast.runs.resume import FINGERPRINT_NAMES, Found, found_in, place_of
from swamp_fast.runs.signals import StopSignals
from swamp_fast.runs.tensorboard import Events
from swamp_fast.version import __version__

FAR_BELOW = 0.05  # an average that much less accurate than its particles' mean is not in their basin
FIRST_ESTIMATE_SECONDS = 1.5  # of training, before the time left is first told
ASK_SECONDS = 0.2  # of training, after which ranks ask each other for signals: the asking costs far less than 1 %

State = dict[str, Tensor]


class Run:
    """The record of a run. As a context it leaves the user's random generators as they were.

    rows       the history so far
    snapshots  each cycle's average, compact in memory, or where its file is
    ticket     the ticket's parameters and buffers, once there is one
    unfinished the training that the folder holds the middle of, until it is over
    ranks      that do it together: the first has the folder and the user's ear, all have the same record
    console    where progress is shown; None: standard error, if the settings say so
    signals    that stop it; runs of a sweep share them
    at_once    how many runs of a sweep are trained together, for run.json
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
        self.problem, self.config, self.ranks = problem, problem.config, ranks
        if ranks.world > 1 and problem.probe.keeps_state:
            raise ValueError(
                f"the model's forward keeps state in plain attributes, which {ranks.world} processes can't hand "
                "over; run it in one, or keep the state in buffers."
            )
        self.console = console if console is not None else Console(self.config.progress and ranks.first)
        self.rows: list[dict[str, Any]] = []
        self.snapshots: list[Packed | Path] = []
        self.ticket: State | None = None
        self.particles: State | None = None
        self.engine: dict[str, Any] = {}
        standardise = problem.standardise.to_dict() if problem.standardise else None
        self.about: dict[str, Any] = {
            "driver": driver,
            "version": __version__,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "lines": list(problem.lines),
            "config": self.config.to_dict(),
            "fingerprints": problem.fingerprints,
            "standardise": standardise,
            "engine": {},
            "where": f"{platform.platform()}, {problem.device}, torch {torch.__version__}",
            "place": place_of(problem.device),
            "moved": [],
        }
        if at_once is not None:
            self.about["at_once"] = at_once
        self.unfinished: Unfinished | None = None
        self.told: list[str] = []  # what the next row's warnings begin with
        self.signals = signals if signals is not None else StopSignals()
        self.asked: int | None = None  # the signal by which all ranks stop now
        self.kept_at = time.perf_counter()  # the newest checkpoint
        self.folder = RunDirectory(self.config.run_dir) if self.config.run_dir is not None and ranks.first else None
        self.events: Events | None = None
        if self.config.tensorboard:
            if self.config.run_dir is None:
                raise ValueError("`tensorboard` writes into run_dir, got run_dir = None; name a folder.")
            if self.folder is not None:
                self.events = Events(self.folder.path / "tensorboard", self.config.ticket_epochs, self.config.epochs)
        self.steps_done = self.steps_left = 0  # of particles; done in this process
        self.steps_asked, self.steps_unasked, self.asked_at = 1, 0, time.perf_counter()
        self.began: float | None = None
        self.told_estimate = False
        self._context = ExitStack()

    def __enter__(self) -> Run:
        """Open the folder, and say what this will cost."""
        with ExitStack() as stack:
            stack.enter_context(generators_left_alone())
            if self.problem.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.problem.device))  # streams and graphs are made on it
            self._same_call()
            self._resume(self.ranks.broadcast_from_first(lambda: self._open(stack)))
            if self.config.run_dir is not None:
                stack.enter_context(self.signals)
            self._introduce()
            self._context = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal, the signals, the folder and the random generators back."""
        self.console.close()
        if self.events is not None:
            self.events.close()
        self._context.__exit__(kind, error, trace)
        if kind is None and self.signals.asked is not None:
            self.signals.stop()

    def keep_ticket(self, state: State) -> None:
        """Record the ticket."""
        self.ticket = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        if self.folder is not None:
            self.folder.write_ticket(self.ticket)
        self._training_is_over()

    def keep_engine(self, engine: dict[str, Any]) -> None:
        """Record what runs, so that resuming replays it."""
        self.engine = self.about["engine"] = engine
        if self.folder is not None:
            self.folder.write_about(self.about)

    def keep_epoch(self, cycle: int | None, epoch: int, losses: list[float], first: int = 0) -> None:
        """Show an epoch's mean losses, of particles from number `first` on, on TensorBoard; cycle None: the ticket."""
        if self.events is not None:
            self.events.epoch(cycle, epoch, losses, first)

    def keep_cycle(self, state: State, masks: State, row: dict[str, Any], score: State) -> None:
        """Record a cycle: its average, masks, row and mask_score; tell the user, on the console and by on_cycle."""
        self._warn(masks, row)
        self.rows.append(row)
        snapshot = Snapshot(state, masks, row, score)
        if self.events is not None:  # before the cycle's file: a run killed in between writes them anew
            self.events.cycle(row)
        if self.folder is not None:
            self.folder.write_cycle(row["cycle"], snapshot, self.rows)
            self.snapshots.append(self.folder.cycle_path(row["cycle"]))
        else:
            self.snapshots.append(snapshot.packed())
        self._training_is_over()
        self.console.line(self._cycle_line(row))
        if self.problem.on_cycle is not None and self.ranks.first:
            self.problem.on_cycle(dict(row))

    def keep_training(self, state: Unfinished) -> None:
        """Record the training under way; nothing without a folder."""
        if self.events is not None:
            self.events.flush()
        if self.folder is not None:
            self.folder.write_training(state)
        self.kept_at = time.perf_counter()

    def kept_of(self, cycle: int | None) -> Unfinished | None:
        """The middle of this training, if the folder holds it."""
        found = self.unfinished
        return found if found is not None and found.cycle == cycle else None

    def go_back_to(self, step: int) -> None:
        """Go on from the checkpoint before the newest, if it is the one after so many steps."""
        newest = self.unfinished
        if self.folder is None or newest is None or newest.steps == step:
            return
        path = self.folder.training_paths()[1]
        with suppress(Damaged):
            kept = self.folder.training(path) if path.exists() else newest
            if (kept.cycle, kept.steps) == (newest.cycle, step):
                self.unfinished = kept

    def seconds_of(self, cycle: int | None) -> float:
        """How long this training took before this process."""
        kept = self.kept_of(cycle)
        return 0.0 if kept is None else kept.seconds

    def tell_dropped(self, cycle: int, lane: int, epoch: int) -> None:
        """Say at once that a particle diverged and is dropped; the cycle's row will have it too."""
        if self.ranks.first:
            warnings.warn(dropped_text(cycle, lane, epoch), UserWarning, stacklevel=4)

    def keep_particles(self, states: list[State]) -> None:
        """Record the particles of the last cycle."""
        self.particles = {name: torch.stack([state[name].detach().cpu() for state in states]) for name in states[0]}
        if self.folder is not None:
            save_tensors(self.folder.path / "particles.safetensors", self.particles)

    def last(self) -> Snapshot:
        """The newest cycle's average."""
        return snapshot_of(self.snapshots[-1])

    def masks_source(self) -> Snapshot:
        """What the next mask is made from; on the first rank, which has the files."""
        return snapshot_of(self.snapshots[0]) if self.config.mask_from == "dense" else self.last()

    def result(self) -> SwampResult:
        """What the call returns."""
        assert self.ticket is not None
        result = SwampResult(
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
        if self.folder is not None:
            result.write_final(self.folder)
        return result

    def step(self, particles: int, where: str) -> bool:
        """Count a training step of so many particles, and show how long it will still take.

        Returns whether to `keep_training`: a checkpoint is due, or a signal asks to stop; then call `stop_if_asked`.
        Ranks do so after the same step, so they ask each other, and as each asking waits for the slowest, only every
        few steps.
        """
        self._show(particles, where)
        self.steps_unasked += 1
        if self.steps_unasked < self.steps_asked:
            return False
        minutes = self.config.checkpoint_minutes
        due = self._ask(minutes > 0 and time.perf_counter() - self.kept_at >= 60 * minutes)
        return self.config.run_dir is not None and (due or self.asked is not None)

    def _ask(self, due: bool) -> bool:
        """Take over a signal that any rank was sent; returns whether a checkpoint is due by the first rank's clock.

        It also says after how many steps to ask again.
        """
        if self.ranks.world == 1:
            self.asked = self.signals.asked
            return due
        now, minutes = time.perf_counter(), self.config.checkpoint_minutes
        pace = (now - self.asked_at) / max(self.steps_unasked, 1)
        wait = min(ASK_SECONDS, 60 * minutes) if minutes > 0 else ASK_SECONDS
        told = [int(due), max(1, int(wait / pace))] if self.ranks.first else [0, 1]
        asked, some_due, self.steps_asked = self.ranks.all_reduce_max([self.signals.asked or 0, *told])
        self.asked = asked or None  # not this rank's own: one that came meanwhile the others don't know of yet
        self.steps_unasked, self.asked_at = 0, now
        return bool(some_due)

    def begin_training(self) -> None:
        """Between two trainings: stop if a signal asked to."""
        self._ask(False)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raise KeyboardInterrupt or SystemExit if a signal asked to stop."""
        if self.asked is not None:
            name = "Ctrl-C" if self.asked == signal.SIGINT else "SIGTERM"
            self.console.line(f"stopped  by {name}; started again with run_dir {self.config.run_dir} the run goes on")
            self.signals.asked = self.asked
            self.signals.stop()

    def _training_is_over(self) -> None:
        self.unfinished, self.kept_at = None, time.perf_counter()
        if self.folder is not None:
            self.folder.forget_training()

    def _show(self, particles: int, where: str) -> None:
        now = time.perf_counter()
        self.steps_left -= particles
        if self.began is None:  # the first step warms up, and is no measure of the pace
            self.began = now
            return
        self.steps_done += particles
        left = (now - self.began) / self.steps_done * self.steps_left
        if not self.told_estimate and now - self.began > FIRST_ESTIMATE_SECONDS:
            self.told_estimate = True
            self.console.line(f"time     about {duration(left)} left at this pace")
        self.console.status(f"{where}, {duration(left)} left")

    def _same_call(self) -> None:
        """Refuse ranks whose calls differ."""
        together = (self.config.run_dir is None, self.config.on_divergence)  # what ranks do together hangs on it
        own = {"the settings": (run_id({**self.about, "fingerprints": {}}), together), **self.problem.fingerprints}
        theirs = self.ranks.broadcast_from_first(lambda: own)
        differ = [name for name, value in own.items() if theirs[name] != value]
        found = self.ranks.all_reduce_max([self.ranks.rank if differ else 0])[0]
        if found:
            what = f": {', '.join(FINGERPRINT_NAMES.get(name, name) for name in differ)}" if differ else ""
            raise ValueError(
                f"every rank must be called with the same, but rank {found}'s call differs from rank 0's{what}. A "
                "model with random weights needs the same seed on each."
            )

    def _open(self, stack: ExitStack) -> Found | None:
        """What the folder holds; an empty one is begun. None without."""
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

    def _resume(self, found: Found | None) -> None:
        """Take over what the folder holds, and count what is left to do."""
        if found is not None:
            self._take_over(found)
        total = total_particle_epochs(self.config)
        if self.events is not None:
            # The last epoch that the middle of a training has whole is looked at again.
            steps = 0 if self.unfinished is None else self.unfinished.steps
            self.events.resume(self.rows, self.ticket is not None, max(steps - 1, 0) // len(self.problem.bounds))
        if self.ticket is not None:
            total -= self.config.ticket_epochs
        total -= sum(self.config.particles_at(row["cycle"]) for row in self.rows) * self.config.epochs
        self.steps_left = total * len(self.problem.bounds)
        if self.unfinished is not None:
            cycle = self.unfinished.cycle
            self.steps_left -= self.unfinished.steps * (1 if cycle is None else self.config.particles_at(cycle))

    def _take_over(self, found: Found) -> None:
        self.ticket, self.rows, self.particles = found.ticket, found.rows, found.particles
        self.unfinished, self.told = found.unfinished, found.told
        self.engine = self.about["engine"] = found.engine
        self.about["moved"] = found.moved
        self.about["began"] = found.began
        self.snapshots = [*found.snapshots]
        if self.folder is None:
            return
        if found.elsewhere:
            self.folder.write_about(self.about)
        self.folder.write_history(self.rows)  # a run that was killed may have written a cycle and not its line

    def _introduce(self) -> None:
        config, line = self.config, self.console.line
        line(f"swamp_fast {__version__}, {self.about['driver']}")
        for text in self.problem.lines:
            line(text)
        particles = (
            config.particles
            if isinstance(config.particles, int)
            else f"{min(config.particles)} … {max(config.particles)}"
        )
        line(
            f"cost     {config.cycles + 1} trainings x {particles} particles x {config.epochs} epochs, and "
            f"{config.ticket_epochs} for the ticket: {total_particle_epochs(config):,} particle-epochs of "
            f"{len(self.problem.bounds)} steps, to density {percent((1 - config.prune) ** config.cycles)}"
        )
        if self.unfinished is not None:
            where = "the ticket" if self.unfinished.cycle is None else f"cycle {self.unfinished.cycle}"
            line(f"resumed  in {where} of {config.cycles}, after step {self.unfinished.steps}, from {config.run_dir}")
        elif self.rows:
            line(f"resumed  after cycle {len(self.rows) - 1} of {config.cycles}, from {config.run_dir}")
        if self.folder is not None and self.problem.probe.keeps_state:
            line("files    a checkpoint a cycle alone: the model keeps state of its own")

    def _warn(self, masks: State, row: dict[str, Any]) -> None:
        """Say what the user should not overlook, and put it into the row."""
        before = self.last().masks if self.snapshots else {}
        told, self.told = self.told, []
        found = [
            f"cycle {row['cycle']}: nothing of {name} is left; the layer is pruned away whole."
            for name, mask in masks.items()
            if not bool(mask.any()) and (name not in before or bool(before[name].any()))
        ]
        held_out = row["val_mean_accuracy"] is not None
        mean, accuracy = (row[f"{'val_' if held_out else ''}{name}"] for name in ("mean_accuracy", "accuracy"))
        if mean is not None and accuracy < mean - FAR_BELOW:
            advice = (
                "Take a later ticket (more ticket_epochs)."
                if held_out
                else "Whether a later ticket is better is to be seen on validation data: pass `val`, such as 0.1."
            )
            found.append(
                f"cycle {row['cycle']}: the average has {percent(accuracy)} accuracy on "
                f"{'val' if held_out else 'test'}, its particles {percent(mean)} in the mean: they did not train into "
                f"one basin. {advice}"
            )
        dropped = [dropped_text(row["cycle"], each["lane"], each["epoch"]) for each in row["dropped"]]
        row["warnings"] = told + dropped + found
        if not self.ranks.first:
            return
        for text in found:
            warnings.warn(text, UserWarning, stacklevel=5)

    def _cycle_line(self, row: dict[str, Any]) -> str:
        text = f"cycle {row['cycle']:>2}/{self.config.cycles}  density {percent(row['density']):>8}"
        if row["accuracy"] is not None:
            each = row["particle_accuracy"]
            text += f"  accuracy {percent(row['accuracy']):>8}  particles {percent(min(each))} … {percent(max(each))}"
        elif row["loss"] is not None:
            text += f"  loss {row['loss']:.4f}"
        return f"{text}  {duration(row['seconds'])}"


def dropped_text(cycle: int, lane: int, epoch: int) -> str:
    """What is said of a particle that is left out."""
    return (
        f"cycle {cycle}, epoch {epoch}: particle {lane} diverged to NaN or infinity and is in no average of the cycle."
    )
