"""Measures how well the final masks of equal runs agree in float32, in which rounding makes runs drift apart.

    python -m benchmarks.agreement

Compares each mode of the eager engine with the naive loop, and the naive loop with itself at another thread count.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measuring import header, write
from swamp_fast import SwampResult, fast_swamp, naive_swamp
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.models import SmallCNN

# (execution mode, whether tensors are channels last)
MODES = [("lanes", False), ("lanes", True), ("fold", False), ("fold_grouped", False)]
SEEDS = 6


def pruned(function: Callable[..., SwampResult], seed: int, threads: int) -> SwampResult:
    """Run `function` with a small CNN on digits through 6 prunings."""
    torch.manual_seed(seed)
    model = SmallCNN(1, 10, 16)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sizes = {"particles": 3, "cycles": 6, "epochs": 4, "ticket_epochs": 2, "batch_size": 64}
        return function(model, "digits", seed=seed, progress=False, **sizes)
    finally:
        torch.set_num_threads(threads_before)


def agreement(one: SwampResult, other: SwampResult) -> float:
    """Return the fraction of the kept weights that two results have in common."""
    both = sum(int((one.masks[name] & other.masks[name]).sum()) for name in one.masks)
    return both / int(one.history[-1]["kept"])


def agreements(mode: str, channels_last: bool) -> tuple[list[float], list[float]]:
    """Return two lists of agreements, one entry per seed.

    The first compares the eager engine with the naive loop, both with two threads. The second compares the naive loop
    with one thread and with two.
    """
    with_naive, naive_with_itself = [], []
    for seed in range(SEEDS):
        naive = pruned(naive_swamp, seed, 2)
        engine = Choice(mode, channels_last, "", {}).name
        with_naive.append(agreement(pruned(partial(fast_swamp, engine=engine), seed, 2), naive))
        naive_with_itself.append(agreement(pruned(naive_swamp, seed, 1), naive))
    return with_naive, naive_with_itself


def main() -> None:
    """Measure the agreements and write benchmarks/results/agreement."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = []
    for mode, channels_last in MODES:
        with_naive, naive_with_itself = agreements(mode, channels_last)
        name = f"fast_swamp, {mode}, channels {'last' if channels_last else 'first'}, with naive_swamp"
        table.append(_row(name, with_naive))
    table.append(_row("naive_swamp with one thread, with itself with two", naive_with_itself))
    about = header(SEEDS) | {"network": "SmallCNN(16) on digits", "cycles": 6, "particles": 3}
    write("agreement", "python -m benchmarks.agreement", about, table)


def _row(name: str, shares: list[float]) -> dict[str, str]:
    mean, low, high = statistics.mean(shares), min(shares), max(shares)
    return {"": name, "kept weights in common, mean": f"{mean:.1%}", "of all seeds": f"{low:.1%} … {high:.1%}"}


if __name__ == "__main__":
    main()
