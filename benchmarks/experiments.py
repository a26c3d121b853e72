"""Tests the claims of the method on real pictures: accuracy over sparsity, barriers, and flatness.

    python -m benchmarks.experiments --out DIR    resumable, also under torchrun

Compares SWAMP with its ablations and baselines under the same seeds: LeNet-300-100 on part of Fashion-MNIST (Debian's
package dataset-fashion-mnist). For SWAMP, IMP and IMP with SWA, it also measures barriers between consecutive
cycles and among the last particles, and traces of the Hessian at equal sparsity.

Writes benchmarks/results/experiments (accuracies) and experiments_geometry.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import RESULTS, header, write
from swamp_fast import compare, distributed
from swamp_fast.analysis import Analysis, averages, barrier_matrix, consecutive, hessian_trace, mask_overlap, particles
from swamp_fast.data.sources import Arrays, open_source
from swamp_fast.runs.result import SwampResult
from swamp_fast.studies.comparison import Comparison

METHODS = ["swamp", "imp", "imp+swa", "swamp-sgd", "imp-swa-schedule", "imp-long", "imp-fine", "one-shot", "random"]
ANALYSED = ["swamp", "imp+swa", "imp"]  # methods whose geometry is measured
SHOWN_CYCLES = (3, 6, 10, 14)  # the tables show these in addition to the dense cycle

COMMAND = "torchrun --nproc-per-node=2 -m benchmarks.experiments --out DIR"

Split = tuple[torch.Tensor, torch.Tensor]


def lenet() -> nn.Module:
    """Return LeNet-300-100 (LeCun et al. 1998), the first network of the lottery ticket papers."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    )


def splits(given: argparse.Namespace) -> dict[str, Split]:
    """Return the first training pictures, the last 2,000 training pictures for validation, and the whole test set."""
    opened = open_source("fashion_mnist", "train", given.data_dir)
    assert isinstance(opened.source, Arrays)
    assert isinstance(opened.test, Arrays)
    inputs, targets = opened.source.inputs.squeeze(3), opened.source.targets
    n = given.samples
    return {
        "train": (inputs[:n], targets[:n]),
        "val": (inputs[-2000:], targets[-2000:]),
        "test": (opened.test.inputs.squeeze(3), opened.test.targets),
    }


def geometry(compared: Comparison, data: dict[str, Split], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Analyse this rank's share of the runs. Return one row per method, seed and cycle."""
    job, rows = distributed.current(), []
    pairs = [(method, seed) for seed in range(given.seeds) for method in ANALYSED]
    for method, seed in pairs[job.rank :: job.world]:
        result = compared.runs[method, seed][0].result
        if result is None:
            raise SystemExit(f"{method}, seed {seed}: {compared.runs[method, seed][0].error}")
        analysis = Analysis(lenet(), data["train"], data["test"], config=result.config)
        paths = consecutive(analysis, result, points=11)
        for cycle, (state, masks) in enumerate(averages(result)):
            row: dict[str, Any] = {"method": method, "seed": seed, "cycle": cycle}
            row["density"] = result.history[cycle]["density"]
            if cycle < len(paths):
                row["next_loss"] = paths[cycle].barrier("train_loss")
                row["next_error"] = paths[cycle].barrier("test_error")
            if cycle in (0, *SHOWN_CYCLES):
                trace = hessian_trace(analysis, state, masks, probes=given.probes, samples=min(2048, given.samples))
                row |= {"trace": trace.trace, "scaled": trace.scaled, "norm": trace.norm}
                row["half_width"] = trace.half_width
            if cycle == len(paths) and method == "swamp":
                barriers = barrier_matrix(analysis, particles(result), points=11)
                row["particles_loss"] = max(map(max, barriers.matrix("train_loss")))
                row["particles_error"] = max(map(max, barriers.matrix("test_error")))
            rows.append(row)
    return rows


def overlaps(compared: Comparison, given: argparse.Namespace) -> dict[int, float]:
    """Return the IoU between the masks of IMP and SWAMP for each cycle, as a mean over seeds."""
    ious: dict[int, list[float]] = {}
    for seed in range(given.seeds):
        results: list[SwampResult | None] = [compared.runs[method, seed][0].result for method in ("swamp", "imp")]
        one, other = (averages(result) for result in results if result is not None)
        for cycle in SHOWN_CYCLES:
            ious.setdefault(cycle, []).append(mask_overlap(one[cycle][1], other[cycle][1]).iou)
    return {cycle: statistics.fmean(values) for cycle, values in ious.items()}


def spread(values: list[float], shown: Callable[[float], str]) -> str:
    """Format the mean and standard deviation of values over seeds."""
    return f"{shown(statistics.fmean(values))} ± {shown(statistics.stdev(values))}"


def circumstances(given: argparse.Namespace) -> dict[str, Any]:
    """Return the header of both tables."""
    return header(1) | {
        "data": f"Fashion-MNIST, the first {given.samples} to train, 10,000 to test",
        "model": "LeNet-300-100",
        "seeds": given.seeds,
        **settings(given),
        "ranks": distributed.current().world,
        "test accuracy, %": "mean ± standard deviation over seeds; * at least dense SGD's and dense SWA's mean",
        "brackets": "95 % intervals of Student's t over seeds",
    }


def write_accuracies(compared: Comparison, about: dict[str, Any]) -> None:
    """Write the accuracies of all methods at the shown cycles, and their differences from imp at the last cycle."""
    summary = {(row["method"], row["cycle"]): row for row in compared.summary}
    paired = {(row["method"], row["cycle"]): row for row in compared.paired}
    table = []
    for method in METHODS:
        line: dict[str, Any] = {"method": method}
        for cycle in (0, *SHOWN_CYCLES):
            row = summary[method, cycle]
            matching = "*" if row["matching_sgd"] and row["matching_swa"] else ""
            name = f"{compared_density(compared, cycle):.1%}"
            line[name] = f"{row['accuracy'] * 100:.2f} ± {row['accuracy_std'] * 100:.2f}{matching}"
        other = paired.get((method, SHOWN_CYCLES[-1]))
        line["against imp at the last, points"] = (
            f"{other['difference'] * 100:+.2f} [{other['low'] * 100:+.2f}, {other['high'] * 100:+.2f}]"
            if other
            else "–"
        )
        last = summary[method, SHOWN_CYCLES[-1]]
        line["particle-epochs"] = round(last["particle_epochs"])
        table.append(line)
    write("experiments", COMMAND, about, table)


def write_geometry(rows: list[dict[str, Any]], iou: dict[int, float], about: dict[str, Any]) -> None:
    """Write barriers, traces and mask overlaps of the analysed methods at the shown cycles."""
    table = []
    for method in ANALYSED:
        for cycle in (0, *SHOWN_CYCLES):
            runs = [row for row in rows if (row["method"], row["cycle"]) == (method, cycle)]
            to_next = [row["next_error"] * 100 for row in runs if "next_error" in row]
            among = [row["particles_error"] * 100 for row in runs if "particles_error" in row]
            table.append(
                {"method": method, "density": f"{runs[0]['density']:.1%}",
                 "barrier to the next cycle, train loss":
                    spread([row["next_loss"] for row in runs], "{:.4f}".format) if to_next else "–",
                 "test error, points": spread(to_next, "{:.2f}".format) if to_next else "–",
                 "largest among particles, test error": spread(among, "{:.2f}".format) if among else "–",
                 "Hessian trace": spread([row["trace"] for row in runs], "{:.1f}".format),
                 "scaled": spread([row["scaled"] for row in runs], "{:.3f}".format),
                 "norm": spread([row["norm"] for row in runs], "{:.2f}".format),
                 "mask IoU, swamp and imp": f"{iou[cycle]:.3f}" if cycle in iou else "–"}
            )  # fmt: skip
    write("experiments_geometry", COMMAND, about, table)


def compared_density(compared: Comparison, cycle: int) -> float:
    """Return the density that the tables show for a cycle."""
    return next(float(row["density"]) for row in compared.summary if row["cycle"] == cycle)


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that all methods share."""
    return {
        "particles": given.particles,
        "cycles": given.cycles,
        "epochs": given.epochs,
        "ticket_epochs": 2,
        "batch_size": 128,
        "lr": 0.1,
        "swa_lr": 0.05,
        "weight_decay": 5e-4,
        "augment": "none",
    }


def main() -> None:
    """Train the missing runs, analyse them, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the runs; a later call continues them"
    )
    parser.add_argument("--data-dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=SHOWN_CYCLES[-1])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--probes", type=int, default=64)
    given = parser.parse_args()
    with distributed.start("cpu") as job:
        data = splits(given)
        compared = compare(
            *(lenet, data["train"], data["test"], METHODS, range(given.seeds)),
            out=given.out,
            val=data["val"],
            keep_particles=True,
            device="cpu",
            **settings(given),
        )
        if compared.errors:
            raise SystemExit(str(compared.errors))
        measured = given.out / "geometry.json"
        if job.broadcast_from_first(lambda: not measured.exists()):
            parts = job.gather_to_first(geometry(compared, data, given))
            if job.first:
                measured.write_text(json.dumps([row for part in parts for row in part], indent=1))
        if job.first:
            print(compared.table())
            about = circumstances(given)
            write_accuracies(compared, about)
            about |= {"probes": given.probes, "trace": "on the first 2,048 training pictures; ± over seeds"}
            write_geometry(json.loads(measured.read_text()), overlaps(compared, given), about)
            compared.figure(RESULTS / "experiments.svg")


if __name__ == "__main__":
    main()
