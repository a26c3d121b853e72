"""What ranks gain: python -m benchmarks.ranks. A training cycle of 4 ResNet-20 by one process, and shared among more.

Each process has one thread. Timed are the training steps of a cycle (the slowest rank's) and the whole cycle with its
evaluation, on data shaped as CIFAR-10; runs of one and of more ranks take turns.

Writes benchmarks/results/ranks.
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

from benchmarks.durability import small_run, workers
from benchmarks.timing import header, summary, write
from swamp_fast import distributed, fast_swamp
from swamp_fast.models import build_model


def launch(world: int, logs: Path, target: Callable[..., None], *args: Any) -> list[ForkServerProcess]:
    """Processes that call target(*args) as the ranks of one job, as torchrun would start them.

    What each writes on standard error is in logs / "rank_R".
    """
    context = workers()
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
    """One process of `launch`."""
    log = os.open(Path(logs) / f"rank_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    with distributed.start("cpu"):
        target(*args)


def small_runs(runs: list[tuple[str, str, float, dict[str, Any]]]) -> None:
    """Some of benchmarks.durability's small runs in turn: engine, folder, minutes between checkpoints, settings."""
    for engine, folder, minutes, settings in runs:
        small_run(engine, folder, "cpu", minutes, **settings)


def cycles(given: argparse.Namespace, out: str) -> None:
    """The run that is timed; its history goes to a file."""
    chance = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (given.samples, 3, 32, 32), dtype=torch.uint8, generator=chance)
    labels = torch.randint(0, 10, (given.samples,), generator=chance)
    torch.manual_seed(0)
    settings = {name: getattr(given, name) for name in ("engine", "particles", "epochs", "cycles")}
    settings |= {"ticket_epochs": 0, "batch_size": 128, "augment": "crop_flip", "device": "cpu", "progress": False}
    model = build_model("resnet20", 3, 32, 32, 10)
    result = fast_swamp(model, (pictures, labels), (pictures[:512], labels[:512]), **settings)
    if distributed.current().first:
        Path(out).write_text(json.dumps(result.history))


def history_of(world: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The history of the run by so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        processes = launch(world, Path(folder), cycles, given, str(Path(folder) / "history"))
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("\n".join(path.read_text() for path in sorted(Path(folder).glob("rank_*"))))
        found: list[dict[str, Any]] = json.loads((Path(folder) / "history").read_text())
        return found


def main() -> None:
    """Time them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine", choices=["fused", "eager"], default="fused")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--samples", type=int, default=5120)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=1, help="pruned ones, after the dense one")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    histories: dict[int, list[list[dict[str, Any]]]] = {1: [], given.ranks: []}
    for _ in range(given.repeats):
        for world, found in histories.items():
            found.append(history_of(world, given))
    table = []
    for cycle in range(given.cycles + 1):
        for what, name in (("training", "train_seconds"), ("whole cycle", "seconds")):
            one, more = (summary([each[cycle][name] for each in found]) for found in histories.values())
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
