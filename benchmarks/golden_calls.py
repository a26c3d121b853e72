"""Eight small calls whose bits must not change: python benchmarks/golden_calls.py TREE NAME OUT, for benchmarks.golden.

They use what is public alone, so that they run with the code of any commit: TREE is where its package is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # instead of this file's own folder
    sys.path[0] = sys.argv[1]

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import swamp_fast
from swamp_fast import SwampResult, compare, fast_swamp, sweep
from swamp_fast.models import MLP, SmallCNN

CLOCKS = ("seconds", "train_seconds", "peak_memory")
SETTINGS: dict[str, Any] = {"particles": 2, "cycles": 2, "epochs": 4, "ticket_epochs": 1, "batch_size": 32, "lr": 0.1}
SETTINGS |= {"swa_lr": 0.05, "device": "cpu", "progress": False}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 2e-3, "swa_lr": 1e-3, "clip_norm": 0.5}
Found = dict[str, Any]  # what a result is called -> tensor, or plain value


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise of uint8 [count, 1, 8, 8], brighter where its class says, and classes [count]."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (count,), generator=generator)
    inputs = torch.randint(128, (count, 1, 8, 8), generator=generator)
    for sample, target in enumerate(targets):
        inputs[sample, :, 2 * int(target) : 2 * int(target) + 2] += 96
    return inputs.to(torch.uint8), targets


TRAIN, TEST = pictures(80, 1), pictures(40, 2)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Samples that are drawn anew each time, which is why they are streamed."""

    def __len__(self) -> int:
        return len(TRAIN[0])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = TRAIN[0][index] / 255
        return picture + 0.1 * torch.randn(picture.shape), int(TRAIN[1][index])


def network() -> nn.Module:
    """A small CNN with BatchNorm."""
    torch.manual_seed(0)
    return SmallCNN(1, 4, 8)


def with_dropout() -> nn.Module:
    """Two convolutions, each with dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(72, 4)),
    )


def perceptron() -> nn.Module:
    """Two hidden layers."""
    torch.manual_seed(0)
    return MLP(64, 4, 32)


def one(make: Callable[[], nn.Module], engine: str, precision: str, train: object = TRAIN, **settings: Any) -> Found:
    """What fast_swamp gives, by name."""
    test = TEST if train is TRAIN else (TEST[0] / 255, TEST[1])
    return of_result(fast_swamp(make(), train, test, engine=engine, precision=precision, **{**SETTINGS, **settings}))


def of_result(result: SwampResult | None) -> Found:
    """History, masks and weights of every cycle, by name."""
    if result is None:
        raise RuntimeError("a run failed.")
    found: Found = {}
    for cycle, row in enumerate(result.history):
        found |= {f"cycle {cycle}, {name}": value for name, value in row.items() if name not in CLOCKS}
        model, masks = result.at(cycle)
        found |= {f"cycle {cycle}, mask of {name}": mask for name, mask in masks.items()}
        found |= {f"cycle {cycle}, {name}": tensor for name, tensor in model.state_dict().items()}
    return found


def a_sweep() -> Found:
    """Four runs that share a bank."""
    grid: dict[str, list[Any]] = {"seed": [0, 1], "lr": [0.1, 0.05]}
    runs = sweep(network, TRAIN, TEST, grid, **{**SETTINGS, "engine": "fused"}).runs
    return {f"{run.point}: {name}": value for run in runs for name, value in of_result(run.result).items()}


def a_comparison() -> Found:
    """Three methods under two seeds."""
    methods = ["swamp", "imp", "random"]
    found = compare(perceptron, TRAIN, TEST, methods, [0, 1], **{**SETTINGS, "engine": "eager"})
    both = [*enumerate(found.rows), *enumerate(found.paired)]
    rows = {f"row {n}, {key}": value for n, row in both for key, value in row.items() if key not in CLOCKS}
    runs = {f"{key}, run {n}": run.result for key, several in found.runs.items() for n, run in enumerate(several)}
    return rows | {f"{key}: {name}": value for key, each in runs.items() for name, value in of_result(each).items()}


CALLS: dict[str, Callable[[], Found]] = {
    "eager": lambda: one(network, "eager", "float32", augment="crop_flip", val=0.2),
    "fused": lambda: one(network, "fused", "float32", augment="crop_flip", val=0.2),
    "eager_adamw": lambda: one(network, "eager", "bfloat16", **ADAMW),
    "fused_adamw": lambda: one(network, "fused", "bfloat16", **ADAMW),
    "dropout": lambda: one(with_dropout, "fused", "float64", keep_particles=True, combine="best", val=0.2),
    "streamed": lambda: one(with_dropout, "eager", "float64", DataLoader(Noisy(), 32), rewind="average"),
    "sweep": a_sweep,
    "compare": a_comparison,
}


if __name__ == "__main__":
    tree, name, out = sys.argv[1:]
    place = Path(swamp_fast.__file__).resolve()
    if not place.is_relative_to(Path(tree).resolve()):
        raise SystemExit(f"the package of {tree} was to run, {place} did.")
    torch.save({"threads": torch.get_num_threads(), "torch": str(torch.__version__), **CALLS[name]()}, out)
