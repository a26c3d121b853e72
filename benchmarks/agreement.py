"""How well final masks agree in float32, where a run is chaotic: the eager engine's ways with the naive loop, beside
the naive loop with itself at another thread count. python -m benchmarks.agreement
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import header, write
from swamp_fast import SwampResult, fast_swamp, naive_swamp
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.models import SmallCNN

WAYS = [("lanes", False), ("lanes", True), ("fold", False), ("fold_grouped", False)]
SEEDS = 6


def pruned(function: Callable[..., SwampResult], seed: int, threads: int) -> SwampResult:
    """A small CNN on digits through 6 prunings."""
    torch.manual_seed(seed)
    model = SmallCNN(1, 10, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sizes = {"particles": 3, "cycles": 6, "epochs": 4, "ticket_epochs": 2, "batch_size": 64}
        return function(model, "digits", seed=seed, progress=False, **sizes)
    finally:
        torch.set_num_threads(before)


def agreement(one: SwampResult, other: SwampResult) -> float:
    """The share of the kept weights that two results have in common."""
    both = sum(int((one.masks[name] & other.masks[name]).sum()) for name in one.masks)
    return both / one.history[-1]["kept"]


def agreements(way: str, channels_last: bool) -> tuple[list[float], list[float]]:
    """Over seeds: of a way with the naive loop, both with two threads; of the naive loop with one and two threads."""
    ours, theirs = [], []
    for seed in range(SEEDS):
        naive = pruned(naive_swamp, seed, 2)
        engine = Choice(way, channels_last, "", {}).name
        ours.append(agreement(pruned(partial(fast_swamp, engine=engine), seed, 2), naive))
        theirs.append(agreement(pruned(naive_swamp, seed, 1), naive))
    return ours, theirs


def main() -> None:
    """Measure and write benchmarks/results/agreement."""
    table = []
    for way, channels_last in WAYS:
        ours, theirs = agreements(way, channels_last)
        name = f"fast_swamp, {way}, channels {'last' if channels_last else 'first'}, with naive_swamp"
        table.append(_row(name, ours))
    table.append(_row("naive_swamp with one thread, with itself with two", theirs))
    about = header(SEEDS) | {"network": "SmallCNN(16) on digits", "cycles": 6, "particles": 3}
    write("agreement", "python -m benchmarks.agreement", about, table)


def _row(name: str, shares: list[float]) -> dict[str, str]:
    mean, low, high = statistics.mean(shares), min(shares), max(shares)
    return {"": name, "kept weights in common, mean": f"{mean:.1%}", "of all seeds": f"{low:.1%} … {high:.1%}"}


if __name__ == "__main__":
    main()
