"""Measures the gain from several ranks: cycles of 4 ResNet-20 trained by one process and by several.

    python -m benchmarks.ranks [--ranks 2] [--engine fused] [--particles 4]

Each process has one thread. Two times are measured on random pictures of CIFAR-10's shape: that of the training steps
of a cycle, on the slowest rank, and that of the whole cycle with its evaluation. Runs by one rank and by several take
turns. Writes benchmarks/results/ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.durability import forkserver, small_run
from benchmarks.measuring import header, summary, write
from benchmarks.steps import random_pictures, seeded_model
from swamp_fast import distributed, fast_swamp


def launch(world: int, logs: Path, target: Callable[..., None], *args: Any) -> list[ForkServerProcess]:
    """Start processes that call target(*args) as the ranks of one job, as torchrun would.

    Rank R writes its standard error to the file logs / "rank_R".
    """
    context = forkserver()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world):
        processes.append(context.Process(target=as_rank, args=(rank, world, port, str(logs), target, args)))
        processes[-1].start()
    return processes


def as_rank(rank: int, world: int, port: int, logs: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Run one rank of `launch`."""
    log = os.open(Path(logs) / f"rank_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    with distributed.start("cpu"):
        target(*args)


def small_runs(runs: list[tuple[str, str, float, dict[str, Any]]]) -> None:
    """Do several small runs of benchmarks.durability, given as engine, folder, checkpoint minutes and settings."""
    for engine, folder, minutes, settings in runs:
        small_run(engine, folder, "cpu", minutes, **settings)


def cycles(given: argparse.Namespace, out: str) -> None:
    """Do the run that is timed, and write its history to a file."""
    pictures, labels = random_pictures(given.samples)
    settings = {name: getattr(given, name) for name in ("engine", "particles", "epochs", "cycles")}
    settings |= {"ticket_epochs": 0, "batch_size": 128, "augment": "crop_flip", "device": "cpu", "progress": False}
    model = seeded_model("resnet20")
    result = fast_swamp(model, (pictures, labels), (pictures[:512], labels[:512]), **settings)
    if distributed.current().first:
        Path(out).write_text(json.dumps(result.history))


def history_of(world: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the history of the run by `world` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        processes = launch(world, Path(folder), cycles, given, str(Path(folder) / "history"))
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("\n".join(path.read_text() for path in sorted(Path(folder).glob("rank_*"))))
        history: list[dict[str, Any]] = json.loads((Path(folder) / "history").read_text())
        return history


def main() -> None:
    """Time runs by one and by several ranks in turns, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine", choices=["fused", "eager"], default="fused")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--samples", type=int, default=5120)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=1, help="pruned cycles, after the dense one")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    histories: dict[int, list[list[dict[str, Any]]]] = {1: [], given.ranks: []}
    for _ in range(given.repeats):
        for world, repeats in histories.items():
            repeats.append(history_of(world, given))
    table = []
    for cycle in range(given.cycles + 1):
        for what, name in (("training", "train_seconds"), ("whole cycle", "seconds")):
            one, more = (summary([history[cycle][name] for history in repeats]) for repeats in histories.values())
            table.append(
                {"density": f"{histories[1][0][cycle]['density']:.3f}", "what": what,
                 **{f"1 rank, s ({key})": round(one[key], 2) for key in ("median", "p20", "p80")},
                 **{f"{given.ranks} ranks, s ({key})": round(more[key], 2) for key in ("median", "p20", "p80")},
                 "ratio": round(one["median"] / more["median"], 2)}
            )  # fmt: skip
    about = header(1) | {"model": "resnet20", "batch": 128} | vars(given)
    options = " ".join(f"--{name} {value}" for name, value in vars(given).items())
    write("ranks", f"python -m benchmarks.ranks {options}", about, table)


if __name__ == "__main__":
    main()
