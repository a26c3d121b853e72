"""Whether a run survives being killed, and what its checkpoints cost: python -m benchmarks.durability kills | cost.

kills  real processes are killed at random moments and started again, on each engine, until the run is through; its
       bits against those of a run that nobody touched
cost   the checkpoints of a training, by time and size, and their share of the run's time

Each writes benchmarks/results/durability_WHAT.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import header, summary, write
from swamp_fast import SwampConfig, SwampResult, fast_swamp
from swamp_fast.cycle.training import Watch
from swamp_fast.models import build_model
from swamp_fast.runs.checkpoint import RunDirectory, Unfinished
from swamp_fast.runs.record import Run

ROOT = Path(__file__).parent.parent
ENGINES = ("eager", "fused", "by density")
BOTH = "fused@0.7,eager:lanes"  # eager in the dense cycles
CLOCKS = ("seconds", "train_seconds", "peak_memory")
SMALL = {"batch_size": 64, "cycles": 2, "epochs": 2, "particles": 2, "ticket_epochs": 1, "prune": 0.5}


class Small(nn.Sequential):
    """A convolution, BatchNorm and dropout: weights, buffers and random numbers to be kept."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8)
        super().__init__(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), norm, nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)),
        )


def small_run(engine: str, folder: str, device: str = "cpu", minutes: float = 1e-6, **changed: Any) -> None:
    """A small run on one engine, or on both, with a checkpoint after each step."""
    torch.set_num_threads(1)
    settings = {**SMALL, "engine": BOTH if engine == "by density" else engine, "device": device}
    settings |= {"progress": False, **changed}
    result = fast_swamp(Small(), "digits", run_dir=folder, checkpoint_minutes=minutes, **settings)
    if result.engine["engine"] != engine:
        raise ValueError(f"the {engine} engine was to run, {result.engine['engine']} did.")


@dataclass
class Crashes:
    """What became of runs that were stopped: how often, where, and whether all ended with the same bits."""

    engine: str
    moments: list[str] = field(default_factory=list)  # what their folders held
    codes: list[int | None] = field(default_factory=list)  # of the stopped processes
    ended: int = 0
    equal: int = 0


def crash(engine: str, folder: Path, times: int, seed: int, device: str = "cpu", by: int = signal.SIGKILL) -> Crashes:
    """Stop runs so many times in all, at random moments, starting each again until it is through."""
    context, chance, crashes = workers(), random.Random(seed), Crashes(engine)
    ready = context.Process(target=time.sleep, args=(0,))  # what all are forked from is there when it ends
    ready.start()
    ready.join()
    whole, began = folder / "whole", time.perf_counter()
    ended(start(context, engine, whole, device))
    seconds = time.perf_counter() - began
    number = 0
    while True:
        own = folder / f"cut {number}"
        process = start(context, engine, own, device)
        if len(crashes.moments) < times:
            process.join(chance.uniform(0, seconds))
            if process.is_alive():
                os.kill(process.pid or 0, by)
                process.join()
                if process.exitcode:
                    crashes.codes.append(process.exitcode)
                    crashes.moments.append(held(own))
                    continue
        ended(process)
        crashes.ended += 1
        crashes.equal += same_bits(whole, own)
        number += 1
        if len(crashes.moments) >= times:
            return crashes


def workers() -> ForkServerContext:
    """Processes that are forked from one which has imported all of it, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
    os.environ.setdefault("PYTHONWARNINGS", "ignore::RuntimeWarning:runpy")  # it is preloaded, and run
    context.set_forkserver_preload(["benchmarks.durability"])
    return context


def start(context: ForkServerContext, engine: str, folder: Path, device: str) -> ForkServerProcess:
    """A process that begins the run, or goes on with it."""
    process = context.Process(target=small_run, args=(engine, str(folder), device))
    process.start()
    return process


def ended(process: ForkServerProcess) -> None:
    """Wait for its end, which must be a good one."""
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"a run that was not stopped ended with {process.exitcode}; its error is above.")


def held(folder: Path) -> str:
    """How far the run of a folder is."""
    directory = RunDirectory(folder)
    if not (folder / "run.json").exists():
        return "before the first step"
    directory.about()
    for path in directory.training_paths():
        if path.exists():
            kept = directory.training(path)
            return f"{'ticket' if kept.cycle is None else f'cycle {kept.cycle}'}, step {kept.steps}"
    return f"after {directory.cycles_done()} cycles" if directory.ticket() is not None else "in the ticket"


def same_bits(a: Path, b: Path) -> bool:
    """Whether two runs are the same: ticket, weights, buffers, masks and history, but for its clocks."""
    runs = [SwampResult.load(path) for path in (a, b)]
    states: list[list[dict[str, Tensor]]] = []
    for run in runs:
        cycles = [run._snapshot(cycle) for cycle in range(len(run.snapshots))]
        states.append([run.ticket, *(each.state for each in cycles), *(each.masks for each in cycles)])
    rows = [[{k: v for k, v in row.items() if k not in CLOCKS} for row in run.history] for run in runs]
    return rows[0] == rows[1] and all(map(same_tensors, *states))


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def kills(tries: int, seed: int, device: str) -> None:
    """The table of crashes."""
    table = []
    for number, engine in enumerate(ENGINES):
        with tempfile.TemporaryDirectory() as folder:
            found = crash(engine, Path(folder), tries, seed + number, device)
        inside = [moment for moment in found.moments if "step" in moment and "before" not in moment]
        table.append(
            {"engine": engine, "kills": len(found.moments), "inside a training": len(inside),
             "runs that ended": found.ended, "with equal bits": found.equal}
        )  # fmt: skip
    about = header(1) | {"signal": "SIGKILL", "seed": seed, "device": device, **SMALL}
    write("durability_kills", f"python -m benchmarks.durability kills --tries {tries} --seed {seed}", about, table)


class Stopwatch:
    """Takes the time of every checkpoint, and the size of its file."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cycle_seconds: list[float] = []
        self.bytes: list[int] = []
        self._taken = 0.0

    def __enter__(self) -> Stopwatch:
        state, training, cycle = Watch.state, Run.keep_training, RunDirectory.write_cycle

        def timed_state(watch: Watch) -> Unfinished:
            began = time.perf_counter()
            found = state(watch)
            self._taken = time.perf_counter() - began
            return found

        def timed_training(run: Run, kept: Unfinished) -> None:
            began = time.perf_counter()
            training(run, kept)
            self.seconds.append(self._taken + time.perf_counter() - began)
            if run.folder is not None:
                self.bytes.append(run.folder.training_paths()[0].stat().st_size)

        def timed_cycle(folder: RunDirectory, *rest: Any) -> None:
            began = time.perf_counter()
            cycle(folder, *rest)
            self.cycle_seconds.append(time.perf_counter() - began)

        self._before = state, training, cycle
        Watch.state, Run.keep_training = timed_state, timed_training  # type: ignore[method-assign]
        RunDirectory.write_cycle = timed_cycle  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Watch.state, Run.keep_training, RunDirectory.write_cycle = self._before  # type: ignore[method-assign]


def cost(given: argparse.Namespace) -> None:
    """The table of what checkpoints cost: short intervals give many; the share at the default one stands beside."""
    chance = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (given.samples, 3, 32, 32), dtype=torch.uint8, generator=chance)
    labels = torch.randint(0, 10, (given.samples,), generator=chance)
    settings = {"particles": given.particles, "cycles": given.cycles, "epochs": given.epochs, "ticket_epochs": 0}
    table = []
    for engine in given.engine:
        with tempfile.TemporaryDirectory(dir=given.dir) as folder, Stopwatch() as watch:
            began = time.perf_counter()
            fast_swamp(
                *(build_model(given.model, 3, 32, 32, 10), (pictures, labels)),
                **{**settings, "engine": engine, "device": given.device, "augment": "crop_flip"},
                run_dir=folder,
                checkpoint_minutes=given.minutes,
            )
            seconds = time.perf_counter() - began
        if not watch.seconds:
            raise SystemExit(f"the {engine} engine's run of {seconds:.0f} s had no checkpoint: lower --minutes")
        each, whole = summary(watch.seconds), sum(watch.seconds) + sum(watch.cycle_seconds)
        default = 60 * SwampConfig().checkpoint_minutes
        table.append(
            {"engine": engine, "checkpoints": len(watch.seconds), "MB, the first": round(watch.bytes[0] / 1e6, 2),
             "MB, the last": round(watch.bytes[-1] / 1e6, 2), "ms": round(each["median"] * 1e3, 1),
             "p20": round(each["p20"] * 1e3, 1), "p80": round(each["p80"] * 1e3, 1),
             "share of this run": f"{whole / seconds:.3%}",
             "share at the default interval": f"{each['median'] / (default + each['median']):.4%}"}
        )  # fmt: skip
    about = header(1) | {"model": given.model, "samples": given.samples, "minutes": given.minutes, **settings}
    about |= {"on": given.device}
    options = ("samples", "particles", "cycles", "epochs", "minutes")
    command = f"python -m benchmarks.durability cost --model {given.model} " + " ".join(
        f"--{name} {getattr(given, name)}" for name in options
    )
    write("durability_cost", command, about, table)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "cost"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tries", type=int, default=20, help="kills on each engine")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--engine", nargs="+", default=["eager", "fused"], help="of `cost`")
    parser.add_argument("--samples", type=int, default=2560, help="pictures at random")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0.05, help="between checkpoints")
    parser.add_argument("--dir", type=Path, help="where `cost` writes; the disk matters")
    given = parser.parse_args()
    if given.what == "kills":
        kills(given.tries, given.seed, given.device)
    else:
        cost(given)


if __name__ == "__main__":
    main()
