"""Writes folders for the tests of reports: the files of runs, analyses and comparisons, with invented numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from swamp_fast import SwampConfig
from swamp_fast.runs.folder import RunDirectory, Snapshot

LAYERS = {"convs.0.weight": (8, 1, 3, 3), "convs.1.weight": (8, 8, 3, 3), "convs.2.weight": (16, 8, 3, 3)}


def write_run(path: Path, cycles: int = 6, done: int = 7, *, test: bool = True, val: bool = True, dropped: bool = False,
              flops: float = 1.8e6, name: str = "SmallCNN", **settings: Any) -> Path:  # fmt: skip
    """Write the folder of a run of which `done` of the cycles 0 … `cycles` are finished."""
    config = SwampConfig(**{"particles": 3, "cycles": cycles, "epochs": 4, "ticket_epochs": 1, "seed": 7} | settings)
    config = config.replace(run_dir=str(path))
    engines = {"ticket": "eager", "0": "eager", **{str(cycle): "fused" for cycle in range(1, done)}}
    about = {
        "driver": "fast_swamp",
        "version": "0.1.0",
        "began": "2026-11-21T09:30:00+00:00",
        "lines": [f"model    {name}: 1,800 prunable of 2,300 trained weights", "train    digits: 1,438 samples on cpu"],
        "config": config.to_dict(),
        "fingerprints": {"model": "8651c26e", "train": "aa896227", "val": None, "prunable": list(LAYERS)},
        "standardise": {"mean": [0.0192], "std": [0.0236]},
        "engine": {
            "engine": "by density",
            "why": "the fused engine from the density on where it is faster",
            "engines": engines,
            "eager": {"engine": "eager", "way": "lanes", "milliseconds": {"lanes, 1 at a time": 15.4, "fold": 11.2}},
        },
        "where": "Linux-6.1, cpu, torch 2.15.0",
        "place": {"device": "cpu", "processor": "AVX512", "threads": 1, "torch": "2.15.0"},
        "moved": [],
    }
    folder = RunDirectory(path)
    folder.create(about, config.to_toml())
    rows: list[dict[str, Any]] = []
    for cycle in range(done):
        density = (1 - config.prune) ** cycle
        lost = [{"lane": 1, "epoch": 2}] if dropped and cycle == 2 else []
        each = [0.97 - 0.02 * cycle / 6 + 0.004 * lane for lane in (0, 2) if lost] or [
            0.97 - 0.02 * cycle / 6 + 0.004 * lane for lane in range(config.particles)
        ]
        masks = {
            layer: torch.arange(math.prod(shape)).view(shape) < round(math.prod(shape) * density ** (0.4 + place))
            for place, (layer, shape) in enumerate(LAYERS.items())
        }
        row = {
            "cycle": cycle, "particles": config.particles, "density": density, "kept": round(1800 * density),
            "flops": round(flops * density**0.8), "train_loss": [0.02 + 0.001 * cycle] * len(each),
            "train_seconds": 3.0 * density**0.5, "seconds": 3.0 * density**0.5 + 0.5, "peak_memory": 857604096,
            "dropped": lost, "warnings": [f"cycle {cycle}, epoch 2: particle 1 diverged"] if lost else [],
            "accuracy": 0.985 - 0.001 * cycle if test else None, "loss": 0.05 + 0.002 * cycle if test else None,
            "particle_accuracy": each if test else None, "particle_loss": [0.06] * len(each) if test else None,
            "mean_accuracy": sum(each) / len(each) if test else None, "ensemble_accuracy": 0.984 if test else None,
            "best_accuracy": each[-1] if test and val else None, "val_accuracy": 0.98 if val else None,
            "val_mean_accuracy": 0.975 if val else None,
        }  # fmt: skip
        rows.append(row)
        state = {layer: torch.where(mask, 0.1, 0.0) for layer, mask in masks.items()}
        folder.write_cycle(cycle, Snapshot(state, masks, row), rows)
    return path


def write_analysis(path: Path, done: int = 7) -> None:
    """Write analysis.json into the folder of a run with `done` finished cycles."""
    t = [step / 10 for step in range(11)]
    curve = [0.05 + 0.3 * x * (1 - x) for x in t]
    both = {"max": 0.004, "mean": 0.006}
    barriers = dict.fromkeys(("train_loss", "train_error", "test_loss", "test_error"), both)
    square = [[0.0, 0.003, 0.011], [0.003, 0.0, 0.007], [0.011, 0.007, 0.0]]
    axis = [step / 5 - 0.5 for step in range(11)]
    bowl = [[0.02 + (x - 0.4) ** 2 + (y - 0.4) ** 2 for x in axis] for y in axis]
    kinds = ("train_loss", "train_error", "test_loss", "test_error")
    found: dict[str, Any] = {
        "about": {"model": "small_cnn", "data": "digits"},
        "consecutive": [
            {"from": c, "to": c + 1, "t": t, "train_loss": curve, "train_error": curve, "test_loss": curve,
             "test_error": curve, "barriers": barriers}
            for c in range(done - 1)
        ],
        "particles": {"cycle": done - 1, "names": ["0", "1", "2"], "over": "max",
                      "matrix": dict.fromkeys(kinds, square)},
        "hessian": [
            {"cycle": c, "density": 0.8**c, "trace": 200.0 + 30 * c, "trace_half_width": 20.0, "scaled": 90.0 - 4 * c,
             "scaled_half_width": 8.0, "probes": 64,
             "layers": {name: {"trace": 60.0, "norm": 3.2, "kept": 500} for name in LAYERS}}
            for c in range(done)
        ],
        "hull": {"mixtures": [[0.2, 0.3, 0.5]] * 4, **{name: [0.03, 0.035, 0.04, 0.05] for name in kinds},
                 "corners": {name: [0.04, 0.05, 0.06] for name in kinds}},
        "plane": {"x": axis, "y": axis, **dict.fromkeys(kinds, bowl), "points": [[0.0, 0.0], [1.0, 0.0], [0.4, 0.9]],
                  "names": ["0", "1", "2"]},
        "against": {
            "run": "b",
            "overlap": [{"cycle": c, "density_a": 0.8**c, "density_b": 0.8**c, "iou": 1 - 0.1 * c, "hamming": 0.05 * c,
                         "layers": dict.fromkeys(LAYERS, 1 - 0.1 * c)} for c in range(done)],
            "barriers": [{"cycle": c, "barriers": barriers} for c in range(done)],
        },
        "masks": [
            {"cycle": c, "layers": dict.fromkeys(LAYERS, 0.8**c), "dead_in": c, "dead_out": 2 * c} for c in range(done)
        ],
        "cost": [
            {"cycle": c, "flops": 1.8e6 * 0.8**c, "bytes": 9000, "kept": 1800, "dense_flops": 1.8e6, "sparse_ms": 0.31,
             "dense_ms": 0.62 if c else None}
            for c in (0, done - 1)
        ],
        "ensemble": {"accuracy": 0.986, "nll": 0.051, "ece": 0.009,
                     "single": {"accuracy": 0.984, "nll": 0.055, "ece": 0.011}},
    }  # fmt: skip
    (path / "analysis.json").write_text(json.dumps(found))


METHODS = (
    "swamp",
    "imp",
    "imp+swa",
    "swamp-sgd",
    "imp-swa-schedule",
    "imp-long",
    "imp-fine",
    "one-shot",
    "random",
    "sms",
)


def write_comparison(path: Path, methods: tuple[str, ...] = METHODS, seeds: int = 5, cycles: int = 6) -> Path:
    """Write the folder of a comparison of methods."""
    path.mkdir(parents=True, exist_ok=True)
    rows, summary, paired = [], [], []
    for place, method in enumerate(methods):
        for cycle in range(cycles + 1):
            density = 0.8 ** (2 * cycle)
            mean = 0.9 - 0.004 * place * cycle / cycles - 0.02 * (cycle / cycles) ** 2
            costs = {
                "particle_epochs": 10.0 * (cycle + 1) * (4 if place < 4 else 1),
                "seconds": 3.0 * (cycle + 1) + place,
            }
            for seed in range(seeds):
                row = {"method": method, "seed": seed, "density": density, "accuracy": mean + 0.002 * (seed - 2)}
                rows.append(row | {"loss": 0.4, **costs})
            match = {"matching_sgd": mean > 0.89, "matching_swa": None if place == 1 else mean > 0.895}
            summary.append(
                {"method": method, "density": density, "seeds": seeds, "accuracy": mean, "accuracy_std": 0.003}
                | match | costs
            )  # fmt: skip
            if method != "imp":
                middle = mean - (0.9 - 0.004 * cycle / cycles - 0.02 * (cycle / cycles) ** 2)
                ends = {"low": middle - 0.002, "high": middle + 0.002} if seeds > 1 else {"low": None, "high": None}
                paired.append({"method": method, "density": density, "seeds": seeds, "difference": middle, **ends})
    dense = {"sgd": 0.895, "swa": 0.9}
    found = {"baseline": "imp", "rows": rows, "summary": summary, "paired": paired, "dense": dense}
    (path / "comparison.json").write_text(json.dumps(found))
    return path
