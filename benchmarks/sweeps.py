"""A sweep against the same runs one by one: 8 runs of 2 particles, the small CNN on digits.

    python -m benchmarks.sweeps [--engine eager fused auto] [--device cuda] [--rounds 3]

On a GPU the runs are trained in one bank; on a CPU that is what the stopwatch decides.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.timing import header, interleaved, write
from swamp_fast import fast_swamp, sweep
from swamp_fast.models import SmallCNN

SETTINGS = {"particles": 2, "cycles": 2, "epochs": 6, "ticket_epochs": 2, "batch_size": 64, "progress": False}
GRID = {"seed": [0, 1, 2, 3], "lr": [0.1, 0.07]}


def made() -> SmallCNN:
    """The small CNN, under the seed that is set."""
    return SmallCNN(1, 10)


def packed(settings: dict[str, Any]) -> None:
    """All runs as a sweep."""
    for run in sweep(made, "digits", None, GRID, **settings).runs:
        if run.error is not None:
            raise run.error


def separate(settings: dict[str, Any]) -> None:
    """Each run by itself."""
    for seed in GRID["seed"]:
        for lr in GRID["lr"]:
            torch.manual_seed(seed)
            fast_swamp(made(), "digits", seed=seed, lr=lr, **settings)


def main() -> None:
    """Time both, taking turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", nargs="+", default=["eager", "fused"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    table = []
    for engine in given.engine:
        settings = {**SETTINGS, "engine": engine, "device": given.device, "precision": given.precision}
        ways = {"separate": lambda own=settings: separate(own), "packed": lambda own=settings: packed(own)}
        found = interleaved(ways, given.rounds)
        table += [
            {"engine": engine, "way": way, **{name: round(each, 2) for name, each in seconds.items()},
             "times as fast": round(found["separate"]["median"] / seconds["median"], 3)}
            for way, seconds in found.items()
        ]  # fmt: skip
    about = header(given.rounds) | {"unit": "s", "on": given.device, "precision": given.precision, **SETTINGS}
    where = "" if given.device == "cpu" else f"_{given.device}"
    write(f"sweeps{where}", f"python -m benchmarks.sweeps --rounds {given.rounds}", about, table)


if __name__ == "__main__":
    main()
