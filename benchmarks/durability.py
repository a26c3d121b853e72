"""Measures whether a run survives being killed, and what its checkpoints cost.

    python -m benchmarks.durability kills    kill real processes at random moments and restart them until the run
                                             ends, on each engine; compare its bits with those of an uninterrupted run
    python -m benchmarks.durability cost     measure time and size of the checkpoints, and their share of the run's time

The results are benchmarks/results/durability_kills and durability_cost.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.measuring import ROOT, header, summary, write
from benchmarks.steps import random_pictures
from swamp_fast import Recipe, SwampConfig, SwampResult, fast_swamp
from swamp_fast.common.timing import Stopwatch
from swamp_fast.cycle.training import Watch
from swamp_fast.models import build_model
from swamp_fast.runs.folder import RunDirectory
from swamp_fast.runs.record import Run

ENGINES = ("eager", "fused", "by density")
SWITCHING = "fused@0.7,eager:lanes"  # the eager engine in the dense cycles, then the fused one
UNREPEATABLE = ("seconds", "train_seconds", "peak_memory")  # columns of the history that differ between equal runs
# Modules that the forkserver imports once for all processes. Importing them takes longer than the small run.
PRELOADED = ["benchmarks.durability", "sklearn.datasets", "torch._dynamo"]
SMALL: dict[str, Any] = {"batch_size": 64, "cycles": 2, "epochs": 2, "particles": 2, "ticket_epochs": 1, "prune": 0.5}


class Small(nn.Sequential):
    """A small CNN with all that a checkpoint must preserve: weights, BatchNorm buffers, and dropout's random state."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8)
        super().__init__(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), norm, nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)),
        )


class Ascent(torch.optim.SGD):
    """SGD whose gradient is taken a step uphill, as in SAM (2010.01412), so its step needs a closure."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad, alpha=0.05)
        closure()
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
        super().step()


def noisy(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return a batch with noise from torch's generator."""
    return inputs + 0.1 * torch.randn_like(inputs), targets


# What a call may add to a plain run: name -> arguments. "closure" runs on the eager engine only.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "schedules": {
        "schedule": "step",
        "step_epochs": 1,
        "warmup_epochs": 0.3,
        "average": "ema",
        "ema_decay": 0.8,
        "average_every": 3,
        "swa_start": 0.0,
    },
    "groups": {"groups": [{"params": "0.*", "lr": 0.5, "weight_decay": 0.0}], "decay_norms_and_biases": False},
    "data": {
        "mixup": 0.4,
        "cutmix": 1.0,
        "accumulate": 2,
        "transform": noisy,
        "shared_order": True,
        "recipe": Recipe(sample_weights=[1.0, 2.0] * 719),
    },
    "optimizer": {"recipe": Recipe(optimizer=lambda named: torch.optim.NAdam([p for _, p in named]))},
    "closure": {"recipe": Recipe(optimizer=lambda named: Ascent([p for _, p in named], lr=0.05, momentum=0.9))},
    "metrics": {
        "metrics": {"margin": lambda outputs, targets: outputs.amax(1)},
        "select_by": "margin",
        "combine": "best",
        "val": 0.1,
    },
}


def small_run(
    engine: str, folder: str, device: str = "cpu", minutes: float = 1e-6, recipe: str = "plain", **changed: Any
) -> None:
    """Do a small run on one engine, or on both if `engine` is SWITCHING; by default with a checkpoint at each step.

    recipe  a key of RECIPES
    """
    torch.set_num_threads(1)
    settings: dict[str, Any] = {**SMALL, "engine": SWITCHING if engine == "by density" else engine, "device": device}
    settings |= {"progress": False, **changed}
    settings |= RECIPES[recipe]
    result = fast_swamp(Small(), "digits", run_dir=folder, checkpoint_minutes=minutes, **settings)
    if result.engine["engine"] != engine:
        raise ValueError(f"expected the {engine} engine to run, but {result.engine['engine']} did.")


@dataclass
class Crashes:
    """How interrupted runs ended.

    moments  progress of the run at each interruption
    codes    exit codes of the interrupted processes
    ended    number of runs that were completed
    equal    number of completed runs with the same bits as an uninterrupted run
    """

    engine: str
    moments: list[str] = field(default_factory=list)
    codes: list[int | None] = field(default_factory=list)
    ended: int = 0
    equal: int = 0


def crash(
    engine: str,
    folder: Path,
    times: int,
    seed: int,
    device: str = "cpu",
    by: int = signal.SIGKILL,
    recipe: str = "plain",
) -> Crashes:
    """Interrupt runs at random moments, `times` times in total, and restart each run until it is complete."""
    context, chance, crashes = forkserver(), random.Random(seed), Crashes(engine)
    ready = context.Process(target=time.sleep, args=(0,))  # once it has ended, the forkserver has imported everything
    ready.start()
    ready.join()
    whole, watch = folder / "whole", Stopwatch()
    join(start(context, engine, whole, device, recipe))
    seconds = watch.seconds
    number = 0
    while True:
        cut = folder / f"cut {number}"
        process = start(context, engine, cut, device, recipe)
        if len(crashes.moments) < times:
            process.join(chance.uniform(0, seconds))
            if process.is_alive():
                os.kill(process.pid or 0, by)
                process.join()
                if process.exitcode:
                    crashes.codes.append(process.exitcode)
                    crashes.moments.append(progress_of(cut))
                    continue
        join(process)
        crashes.ended += 1
        crashes.equal += same_bits(whole, cut)
        number += 1
        if len(crashes.moments) >= times:
            return crashes


def forkserver() -> ForkServerContext:
    """Return a context whose processes are forked from a server that has imported everything and has no threads."""
    context = multiprocessing.get_context("forkserver")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
    # runpy warns that this module was imported before it is run.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::RuntimeWarning:runpy")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(context: ForkServerContext, engine: str, folder: Path, device: str, recipe: str) -> ForkServerProcess:
    """Start a process that starts the run or resumes it."""
    process = context.Process(target=small_run, args=(engine, str(folder), device, 1e-6, recipe))
    process.start()
    return process


def join(process: ForkServerProcess) -> None:
    """Wait until a process ends. Raise RuntimeError if it failed."""
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"a run that was not interrupted ended with {process.exitcode}; its error is above.")


def progress_of(folder: Path) -> str:
    """Describe how far the run in a folder is."""
    directory = RunDirectory(folder)
    if not (folder / "run.json").exists():
        return "before the first step"
    directory.about()
    for path in directory.training_paths():
        if path.exists():
            training = directory.training(path)
            return f"{'ticket' if training.cycle is None else f'cycle {training.cycle}'}, step {training.steps}"
    return f"after {directory.cycles_done()} cycles" if directory.ticket() is not None else "in the ticket"


def same_bits(a: Path, b: Path) -> bool:
    """Whether two runs have the same ticket, weights, buffers, masks and history, except for times and memory."""
    runs = [SwampResult.load(path) for path in (a, b)]
    states: list[list[dict[str, Tensor]]] = []
    for run in runs:
        cycles = [run._snapshot(cycle) for cycle in range(len(run.snapshots))]
        states.append([run.ticket, *(each.state for each in cycles), *(each.masks for each in cycles)])
    rows = [[{k: v for k, v in row.items() if k not in UNREPEATABLE} for row in run.history] for run in runs]
    return rows[0] == rows[1] and all(map(same_tensors, *states))


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def kills(tries: int, seed: int, device: str) -> None:
    """Kill runs on each engine, and write the table."""
    table = []
    for number, engine in enumerate(ENGINES):
        with tempfile.TemporaryDirectory() as folder:
            crashes = crash(engine, Path(folder), tries, seed + number, device)
        inside = [moment for moment in crashes.moments if "step" in moment and "before" not in moment]
        table.append(
            {"engine": engine, "kills": len(crashes.moments), "inside a training": len(inside),
             "runs that ended": crashes.ended, "with equal bits": crashes.equal}
        )  # fmt: skip
    about = header(1) | {"signal": "SIGKILL", "seed": seed, "device": device, **SMALL}
    write("durability_kills", f"python -m benchmarks.durability kills --tries {tries} --seed {seed}", about, table)


class CheckpointTimes:
    """A context that measures the seconds of every checkpoint and the bytes of its file.

    seconds        times of checkpoints inside trainings, to collect the state and write it
    cycle_seconds  times of checkpoints at the end of cycles
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cycle_seconds: list[float] = []
        self.bytes: list[int] = []
        self._collecting = 0.0
        self._patched = ExitStack()

    def __enter__(self) -> CheckpointTimes:
        def state_collected(seconds: float, *_: Any) -> None:
            self._collecting = seconds

        def training_written(seconds: float, run: Run, *_: Any) -> None:
            self.seconds.append(self._collecting + seconds)
            if run.folder is not None:
                self.bytes.append(run.folder.training_paths()[0].stat().st_size)

        def cycle_written(seconds: float, *_: Any) -> None:
            self.cycle_seconds.append(seconds)

        for owner, name, report in (
            (Watch, "state", state_collected),
            (Run, "keep_training", training_written),
            (RunDirectory, "write_cycle", cycle_written),
        ):
            timed = _timed(getattr(owner, name), report)
            self._patched.enter_context(mock.patch.object(owner, name, timed))
        return self

    def __exit__(self, *_: object) -> None:
        self._patched.close()


def _timed(method: Callable[..., Any], report: Callable[..., None]) -> Callable[..., Any]:
    """Return a method that also calls report(seconds, *arguments)."""

    def call(*arguments: Any) -> Any:
        watch = Stopwatch()
        returned = method(*arguments)
        report(watch.seconds, *arguments)
        return returned

    return call


def cost(given: argparse.Namespace) -> None:
    """Measure what checkpoints cost, and write the table.

    Short intervals give many checkpoints to measure. Their share of the time at the default interval is then computed.
    """
    settings = {"particles": given.particles, "cycles": given.cycles, "epochs": given.epochs, "ticket_epochs": 0}
    table = []
    for engine in given.engine:
        with tempfile.TemporaryDirectory(dir=given.dir) as folder, CheckpointTimes() as times:
            watch = Stopwatch()
            fast_swamp(
                *(build_model(given.model, 3, 32, 32, 10), random_pictures(given.samples)),
                **{**settings, "engine": engine, "device": given.device, "augment": "crop_flip"},
                run_dir=folder,
                checkpoint_minutes=given.minutes,
            )
            seconds = watch.seconds
        if not times.seconds:
            raise SystemExit(f"the {engine} engine's run of {seconds:.0f} s wrote no checkpoint: lower --minutes")
        one, total = summary(times.seconds), sum(times.seconds) + sum(times.cycle_seconds)
        interval = 60 * SwampConfig().checkpoint_minutes
        table.append(
            {"engine": engine, "checkpoints": len(times.seconds), "MB, the first": round(times.bytes[0] / 1e6, 2),
             "MB, the last": round(times.bytes[-1] / 1e6, 2), "ms": round(one["median"] * 1e3, 1),
             "p20": round(one["p20"] * 1e3, 1), "p80": round(one["p80"] * 1e3, 1),
             "share of this run": f"{total / seconds:.3%}",
             "share at the default interval": f"{one['median'] / (interval + one['median']):.4%}"}
        )  # fmt: skip
    about = header(1) | {"model": given.model, "samples": given.samples, "minutes": given.minutes, **settings}
    about |= {"on": given.device}
    options = [f"--{name} {getattr(given, name)}" for name in ("samples", "particles", "cycles", "epochs", "minutes")]
    command = f"python -m benchmarks.durability cost --model {given.model} {' '.join(options)}"
    write("durability_cost", command, about, table)


def main() -> None:
    """Run the requested benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "cost"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tries", type=int, default=20, help="number of kills on each engine")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--engine", nargs="+", default=["eager", "fused"], help="engines of `cost`")
    parser.add_argument("--samples", type=int, default=2560, help="number of random pictures")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0.05, help="minutes between checkpoints")
    parser.add_argument("--dir", type=Path, help="folder for the checkpoints of `cost`; the speed of its disk matters")
    given = parser.parse_args()
    if given.what == "kills":
        kills(given.tries, given.seed, given.device)
    else:
        cost(given)


if __name__ == "__main__":
    main()
