"""The method's questions on real pictures: python -m benchmarks.experiments --out DIR. Resumable, also under torchrun.

Accuracy over sparsity of SWAMP, its ablations and baselines under the same seeds, on part of Fashion-MNIST (Debian's
package dataset-fashion-mnist); barriers between consecutive cycles and among the last particles; traces of the
Hessian of IMP, IMP with SWA and SWAMP at equal sparsity. LeNet-300-100, which still matches at the sparsities shown.

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

from benchmarks.timing import RESULTS, header, write
from swamp_fast import compare, distributed
from swamp_fast.analysis import Analysis, averages, barrier_matrix, consecutive, hessian_trace, mask_overlap, particles
from swamp_fast.data.sources import Arrays, open_source
from swamp_fast.runs.result import SwampResult
from swamp_fast.studies.comparison import Comparison

METHODS = ["swamp", "imp", "imp+swa", "swamp-sgd", "imp-swa-schedule", "imp-long", "imp-fine", "one-shot", "random"]
LOOKED_AT = ["swamp", "imp+swa", "imp"]  # of which the geometry is shown
SHOWN = (3, 6, 10, 14)  # cycles of the table

Split = tuple[torch.Tensor, torch.Tensor]


def lenet() -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998), the lottery tickets' first network."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    )


def splits(given: argparse.Namespace) -> dict[str, Split]:
    """The first pictures to train, the last 2,000 of the training set to validate, all of the test set."""
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
    """Barriers and traces of each run of this rank's, a row a method, seed and cycle."""
    job, rows = distributed.current(), []
    pairs = [(method, seed) for seed in range(given.seeds) for method in LOOKED_AT]
    for method, seed in pairs[job.rank :: job.world]:
        result = compared.runs[method, seed][0].result
        if result is None:
            raise SystemExit(f"{method}, seed {seed}: {compared.runs[method, seed][0].error}")
        on = Analysis(lenet(), data["train"], data["test"], config=result.config)
        paths = consecutive(on, result, points=11)
        for cycle, (state, masks) in enumerate(averages(result)):
            row: dict[str, Any] = {"method": method, "seed": seed, "cycle": cycle}
            row["density"] = result.history[cycle]["density"]
            if cycle < len(paths):
                row["next_loss"] = paths[cycle].barrier("train_loss")
                row["next_error"] = paths[cycle].barrier("test_error")
            if cycle in (0, *SHOWN):
                trace = hessian_trace(on, state, masks, probes=given.probes, samples=min(2048, given.samples))
                row |= {"trace": trace.trace, "scaled": trace.scaled, "norm": trace.norm}
                row["half_width"] = trace.half_width
            if cycle == len(paths) and method == "swamp":
                among = barrier_matrix(on, particles(result), points=11)
                row["particles_loss"] = max(map(max, among.matrix("train_loss")))
                row["particles_error"] = max(map(max, among.matrix("test_error")))
            rows.append(row)
    return rows


def overlaps(compared: Comparison, given: argparse.Namespace) -> dict[int, float]:
    """The IoU of the masks of IMP and SWAMP, the mean over seeds, by cycle."""
    found: dict[int, list[float]] = {}
    for seed in range(given.seeds):
        results: list[SwampResult | None] = [compared.runs[method, seed][0].result for method in ("swamp", "imp")]
        one, other = (averages(result) for result in results if result is not None)
        for cycle in SHOWN:
            found.setdefault(cycle, []).append(mask_overlap(one[cycle][1], other[cycle][1]).iou)
    return {cycle: statistics.fmean(each) for cycle, each in found.items()}


def spread(values: list[float], shown: Callable[[float], str]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{shown(statistics.fmean(values))} ± {shown(statistics.stdev(values))}"


def tables(compared: Comparison, rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Write both results."""
    summary = {(row["method"], row["cycle"]): row for row in compared.summary}
    paired = {(row["method"], row["cycle"]): row for row in compared.paired}
    table = []
    for method in METHODS:
        line: dict[str, Any] = {"method": method}
        for cycle in (0, *SHOWN):
            row = summary[method, cycle]
            matching = "*" if row["matching_sgd"] and row["matching_swa"] else ""
            name = f"{compared_density(compared, cycle):.1%}"
            line[name] = f"{row['accuracy'] * 100:.2f} ± {row['accuracy_std'] * 100:.2f}{matching}"
        other = paired.get((method, SHOWN[-1]))
        line["against imp at the last, points"] = (
            f"{other['difference'] * 100:+.2f} [{other['low'] * 100:+.2f}, {other['high'] * 100:+.2f}]"
            if other
            else "–"
        )
        last = summary[method, SHOWN[-1]]
        line["particle-epochs"] = round(last["particle_epochs"])
        table.append(line)
    about = header(1) | {
        "data": f"Fashion-MNIST, the first {given.samples} to train, 10,000 to test",
        "model": "LeNet-300-100",
        "seeds": given.seeds,
        **settings(given),
        "ranks": distributed.current().world,
        "test accuracy, %": "mean ± standard deviation over seeds; * at least dense SGD's and dense SWA's mean",
        "brackets": "95 % intervals of Student's t over seeds",
    }
    command = "torchrun --nproc-per-node=2 -m benchmarks.experiments --out DIR"
    write("experiments", command, about, table)
    iou = overlaps(compared, given)
    lines = []
    for method in LOOKED_AT:
        for cycle in (0, *SHOWN):
            own = [row for row in rows if (row["method"], row["cycle"]) == (method, cycle)]
            to_next = [row["next_error"] * 100 for row in own if "next_error" in row]
            among = [row["particles_error"] * 100 for row in own if "particles_error" in row]
            lines.append(
                {"method": method, "density": f"{own[0]['density']:.1%}",
                 "barrier to the next cycle, train loss":
                    spread([row["next_loss"] for row in own], "{:.4f}".format) if to_next else "–",
                 "test error, points": spread(to_next, "{:.2f}".format) if to_next else "–",
                 "largest among particles, test error": spread(among, "{:.2f}".format) if among else "–",
                 "Hessian trace": spread([row["trace"] for row in own], "{:.1f}".format),
                 "scaled": spread([row["scaled"] for row in own], "{:.3f}".format),
                 "norm": spread([row["norm"] for row in own], "{:.2f}".format),
                 "mask IoU, swamp and imp": f"{iou[cycle]:.3f}" if cycle in iou else "–"}
            )  # fmt: skip
    about |= {"probes": given.probes, "trace": "on the first 2,048 training pictures; ± over seeds"}
    write("experiments_geometry", command, about, lines)
    compared.figure(RESULTS / "experiments.svg")


def compared_density(compared: Comparison, cycle: int) -> float:
    """The density that a cycle is shown under."""
    return next(float(row["density"]) for row in compared.summary if row["cycle"] == cycle)


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What all methods share."""
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
    """Train what is missing, look at it, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the runs' folder, on which a later call goes on")
    parser.add_argument("--data-dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=SHOWN[-1])
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
        looked_at = given.out / "geometry.json"
        if job.decided(lambda: not looked_at.exists()):
            parts = job.collected(geometry(compared, data, given))
            if job.first:
                looked_at.write_text(json.dumps([row for part in parts for row in part], indent=1))
        if job.first:
            print(compared.table())
            tables(compared, json.loads(looked_at.read_text()), given)


if __name__ == "__main__":
    main()
