"""Eight small calls whose bits must not change, for benchmarks.golden.

    python benchmarks/golden_calls.py TREE NAME OUT    run the call NAME with the package in TREE; write its results

The calls use only public names, so that they run with the code of any commit.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # import the package from TREE, not from the folder of this file
    sys.path[0] = sys.argv[1]

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import swamp_fast
from swamp_fast import SwampResult, compare, fast_swamp, sweep
from swamp_fast.models import MLP, SmallCNN

UNREPEATABLE = ("seconds", "train_seconds", "peak_memory")
SETTINGS: dict[str, Any] = {"particles": 2, "cycles": 2, "epochs": 4, "ticket_epochs": 1, "batch_size": 32, "lr": 0.1}
SETTINGS |= {"swa_lr": 0.05, "device": "cpu", "progress": False}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 2e-3, "swa_lr": 1e-3, "clip_norm": 0.5}
Results = dict[str, Any]  # name -> tensor or plain value


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return uint8 noise [count, 1, 8, 8] in which two rows, given by the class, are brighter, and classes [count]."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (count,), generator=generator)
    inputs = torch.randint(128, (count, 1, 8, 8), generator=generator)
    for sample, target in enumerate(targets):
        inputs[sample, :, 2 * int(target) : 2 * int(target) + 2] += 96
    return inputs.to(torch.uint8), targets


TRAIN, TEST = pictures(80, 1), pictures(40, 2)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Samples that get new noise at each access, so that they must be streamed."""

    def __len__(self) -> int:
        return len(TRAIN[0])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = TRAIN[0][index] / 255
        return picture + 0.1 * torch.randn(picture.shape), int(TRAIN[1][index])


def network() -> nn.Module:
    """Return a small CNN with BatchNorm."""
    torch.manual_seed(0)
    return SmallCNN(1, 4, 8)


def with_dropout() -> nn.Module:
    """Return a network of two convolutions with dropout after each."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(72, 4)),
    )


def perceptron() -> nn.Module:
    """Return an MLP with two hidden layers."""
    torch.manual_seed(0)
    return MLP(64, 4, 32)


def one(make: Callable[[], nn.Module], engine: str, precision: str, train: object = TRAIN, **settings: Any) -> Results:
    """Do a run by fast_swamp. Return its results by name."""
    test = TEST if train is TRAIN else (TEST[0] / 255, TEST[1])
    return of_result(fast_swamp(make(), train, test, engine=engine, precision=precision, **{**SETTINGS, **settings}))


def of_result(result: SwampResult | None) -> Results:
    """Return the history, and the masks and weights of every cycle, by name."""
    if result is None:
        raise RuntimeError("a run failed.")
    results: Results = {}
    for cycle, row in enumerate(result.history):
        row = {**row, "warnings": len(row["warnings"])}  # compare their number only, as their texts may change
        results |= {f"cycle {cycle}, {name}": value for name, value in row.items() if name not in UNREPEATABLE}
        model, masks = result.at(cycle)
        results |= {f"cycle {cycle}, mask of {name}": mask for name, mask in masks.items()}
        results |= {f"cycle {cycle}, {name}": tensor for name, tensor in model.state_dict().items()}
    return results


def a_sweep() -> Results:
    """Return the results of a sweep of four runs that share a bank of the eager engine."""
    for name in ("swamp_fast.sweeps", "swamp_fast.studies.packing"):  # one of them, by commit, lets a stopwatch choose
        with suppress(ImportError):
            importlib.import_module(name).runs_at_once = lambda engine, problems: (len(problems), "all of them")
    grid: dict[str, list[Any]] = {"seed": [0, 1], "lr": [0.1, 0.05]}
    runs = sweep(network, TRAIN, TEST, grid, **{**SETTINGS, "engine": "eager:lanes"}).runs
    if not all(run.result is not None and run.result.about["at_once"] == len(runs) for run in runs):
        raise RuntimeError("the runs of the sweep didn't share a bank.")
    return {f"{run.point}: {name}": value for run in runs for name, value in of_result(run.result).items()}


def a_comparison() -> Results:
    """Return the results of three methods under two seeds."""
    methods = ["swamp", "imp", "random"]
    compared = compare(perceptron, TRAIN, TEST, methods, [0, 1], **{**SETTINGS, "engine": "eager"})
    both = [*enumerate(compared.rows), *enumerate(compared.paired)]
    rows = {f"row {n}, {key}": value for n, row in both for key, value in row.items() if key not in UNREPEATABLE}
    runs = {f"{key}, run {n}": run.result for key, several in compared.runs.items() for n, run in enumerate(several)}
    return rows | {f"{key}: {name}": value for key, run in runs.items() for name, value in of_result(run).items()}


CALLS: dict[str, Callable[[], Results]] = {
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
        raise SystemExit(f"expected the package of {tree}, but imported {place}.")
    torch.save({"threads": torch.get_num_threads(), "torch": str(torch.__version__), **CALLS[name]()}, out)
