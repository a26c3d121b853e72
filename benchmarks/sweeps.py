"""Times a sweep of 8 runs of 2 particles against the same runs one after the other: the small CNN on digits.

    python -m benchmarks.sweeps [--engine eager fused auto] [--device cuda] [--rounds 3]

On a GPU the runs are trained in one bank. On a CPU, the sweep first measures whether that is faster.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import header, interleaved, write
from swamp_fast import fast_swamp, sweep
from swamp_fast.models import SmallCNN

SETTINGS = {"particles": 2, "cycles": 2, "epochs": 6, "ticket_epochs": 2, "batch_size": 64, "progress": False}
GRID: dict[str, list[Any]] = {"seed": [0, 1, 2, 3], "lr": [0.1, 0.07]}


def network() -> SmallCNN:
    """Return the small CNN; torch's current seed decides its weights."""
    return SmallCNN(1, 10)


def packed(settings: dict[str, Any]) -> None:
    """Train all runs in one sweep."""
    for run in sweep(network, "digits", None, GRID, **settings).runs:
        if run.error is not None:
            raise run.error


def separate(settings: dict[str, Any]) -> None:
    """Train the runs one after the other."""
    for seed in GRID["seed"]:
        for lr in GRID["lr"]:
            torch.manual_seed(seed)
            fast_swamp(network(), "digits", seed=seed, lr=lr, **settings)


def main() -> None:
    """Time the sweep and the separate runs in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", nargs="+", default=["eager", "fused"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    table = []
    for engine in given.engine:
        settings = {**SETTINGS, "engine": engine, "device": given.device, "precision": given.precision}
        contenders = {"separate": partial(separate, settings), "packed": partial(packed, settings)}
        times = interleaved(contenders, given.rounds)
        table += [
            {"engine": engine, "way": name, **{key: round(seconds, 2) for key, seconds in quantiles.items()},
             "times as fast": round(times["separate"]["median"] / quantiles["median"], 3)}
            for name, quantiles in times.items()
        ]  # fmt: skip
    about = header(given.rounds) | {"unit": "s", "on": given.device, "precision": given.precision, **SETTINGS}
    where = "" if given.device == "cpu" else f"_{given.device}"
    write(f"sweeps{where}", f"python -m benchmarks.sweeps --rounds {given.rounds}", about, table)


if __name__ == "__main__":
    main()
